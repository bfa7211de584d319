"""Words and numbers for cards: formatting, summaries over many SAEs, loading snippets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hubsae.core.config import SAEConfig
from hubsae.core.metadata import Metadata, Section
from hubsae.formats.saelens import fidelity

if TYPE_CHECKING:
    from hubsae.hub.card import Card, Record

T = TypeVar("T")

_LABELS = {
    "id": "id",
    "lr": "learning rate",
    "lr_schedule": "learning-rate schedule",
    "dead_rule": "dead-feature rule",
    "aux_loss": "auxiliary loss",
    "split": "train/validation split",
    "selection": "checkpoint selection",
    "warm_start": "warm start from",
    "text_dataset": "texts",
    "module_path": "module",
    "transformer_lens": "TransformerLens name",
    "prepend_bos": "BOS prepended",
    "final_norm": "side of the final norm",
    "source_format": "source format",
    "converter": "written by",
    "folded": "folded into the weights",
}
# what a reader has to know to use or to trust an SAE, and where it would stand
_WANTED = (
    ("base model", lambda m: m.base_model.id),
    ("base model revision", lambda m: m.base_model.revision),
    ("hook point", lambda m: m.hook.module_path or m.hook.transformer_lens),
    ("number of training tokens", lambda m: m.training.tokens or m.activations.tokens),
    ("activation dataset", lambda m: m.activations.id or m.activations.text_dataset),
    ("training settings", lambda m: m.training.lr or m.training.optimizer or m.training.epochs or m.training.steps),
    ("reconstruction metrics", lambda m: m.metrics or None),
)


def unique(values: Iterable[T | None]) -> list[T]:
    """The distinct values that are not None, in order of appearance."""
    return list(dict.fromkeys(value for value in values if value is not None))


def step_of(stage: str) -> int:
    """The number at the end of a stage's name; -1 for names without one (the base model).

    >>> step_of("ppo_step116"), step_of("instruct_base")
    (116, -1)
    """
    found = re.search(r"(\d+)$", stage)
    return int(found.group(1)) if found else -1


def architecture_name(name: str) -> str:
    """An architecture as papers write it.

    >>> architecture_name("batch_topk")
    'BatchTopK'
    """
    names = {"relu": "ReLU", "topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "gated"}
    return names.get(name, name)


def number(value: Any) -> str:
    """A number with four significant digits, as tables show it.

    >>> number(0.000479123), number(64), number(12854016), number(0.29)
    ('0.0004791', '64', '12,854,016', '0.29')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def number_text(text: str) -> str:
    """A cell of a CSV file: a decimal fraction shortened like `number`, anything else as it is.

    >>> number_text("0.19351174841429133"), number_text("1087"), number_text("layer6")
    ('0.1935', '1087', 'layer6')
    """
    if "." not in text:
        return text
    try:
        return number(float(text))
    except ValueError:
        return text


def human_bytes(size: float) -> str:
    """Bytes as people read them.

    >>> human_bytes(51_416_064)
    '51.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def cell(value: Any) -> str:
    """Text for one cell of a Markdown table: one line, no column separators, no markup of its own."""
    if value is None or value == "":
        return "–"
    text = number(value)
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "'")


def listing(values: Sequence[Any], most: int = 12) -> str:
    """Values as a list in a sentence.

    >>> listing([6, 12, 18, 23])
    '6, 12, 18 and 23'
    """
    texts = [str(v) for v in values]
    if len(texts) > most:
        return f"{', '.join(texts[: most - 1])}, … {texts[-1]} ({len(texts)} in all)"
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def facts(section: str, records: Sequence[Metadata]) -> list[tuple[str, str]]:
    """(label, value) for everything a section of the metadata records, over all SAEs of a release."""
    values: dict[str, list[Any]] = {}
    for record in records:
        part = getattr(record, section)
        for name, value in part:
            if section == "normalizer" and part.kind == "none" and name == "folded":
                continue
            if value not in (None, "", [], {}):
                values.setdefault(name, []).append(value)
    rows = []
    for name, found in values.items():
        text = _summary(found)
        if len(found) < len(records):
            text += f" (recorded for {len(found)} of {len(records)})"
        label = "input normalisation" if (section, name) == ("normalizer", "kind") else _LABELS.get(name)
        rows.append((label or name.replace("_", " "), text))
    return rows


def _summary(values: list[Any]) -> str:
    flat = [_flat(value) for value in values]
    distinct = unique(flat)
    if len(distinct) == 1:
        return cell(distinct[0])
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct):
        if len(distinct) > 6:
            return f"{number(min(distinct))} … {number(max(distinct))}"
        return listing([number(v) for v in sorted(distinct)])
    return listing([cell(v) for v in distinct], most=6)


def _flat(value: Any) -> Any:
    if isinstance(value, Section):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return value


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def not_recorded(records: Sequence[Metadata]) -> list[str]:
    """What a reader would want to know and no SAE of the release says."""
    return [label for label, get in _WANTED if not any(get(m) for m in records)]


def saelens_limits(metadata: Metadata) -> str | None:
    """What stock SAELens gets instead of this SAE, or None where it computes the same."""
    known = fidelity(metadata.config)
    return None if known.exact else known.note


def snippets(card: Card) -> dict[str, str]:
    """Code that loads the example SAE: with hubsae, stock SAELens, nothing but safetensors, and in its model."""
    record, repo, at = card.example, card.repo_id, card.revision
    named = f'"{repo}@{at}"' if at else f'"{repo}"'
    pinned = f', revision="{at}"' if at else ""
    width = record.metadata.config.d_in
    found = {
        "hubsae": (
            "import torch\nfrom hubsae import HubSAE\n\n"
            f'sae = HubSAE.from_pretrained({named}, "{record.id}")\n'
            f"x = torch.randn(4, {width})  # activations at the hook point\n"
            "codes = sae.encode_sparse(x)  # codes.indices, codes.values: [4, active latents]\n"
            "x_hat = sae.decode(codes)"
        ),
        "safetensors": _bare(record, repo, pinned),
    }
    if not at:  # SAELens knows no revisions
        found["saelens"] = (
            "import torch\nfrom sae_lens import SAE\n\n"
            f'sae = SAE.from_pretrained("{repo}", "{record.path}")\n'
            f"x = torch.randn(4, {width})\n"
            "z = sae.encode(x)  # dense [4, d_sae]\n"
            "x_hat = sae.decode(z)"
        )
    base, hook = record.metadata.base_model, record.metadata.hook
    if base.id and (hook.module_path or hook.transformer_lens) and not base.adapter:
        stage = f"  # weights of stage {base.stage!r} go here" if base.stage and len(card.stages) > 1 else ""
        revision = f', revision="{base.revision}"' if base.revision else ""
        found["model"] = (
            "import torch\nfrom hubsae import HubSAE\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'sae = HubSAE.from_pretrained({named}, "{record.id}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{base.id}"{revision}){stage}\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{base.id}"{revision})\n'
            'batch = tokenizer("The answer is", return_tensors="pt")\n\n'
            "with sae.attach(model) as acts, torch.no_grad():  # read the codes at the hook point\n"
            "    model(**batch)\n"
            "print(acts.codes.indices.shape)\n\n"
            "with sae.steer(model, feature=0, strength=8.0):  # or push one feature\n"
            "    out = model.generate(**batch, max_new_tokens=20)"
        )
    return found


def _bare(record: Record, repo: str, pinned: str) -> str:
    config = record.metadata.config
    file = "sae_weights.safetensors" if record.path == "." else f"{record.path}/sae_weights.safetensors"
    lines = [
        "import torch",
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        "",
        f'w = load_file(hf_hub_download("{repo}", "{file}"{pinned}))',
        f"x = torch.randn(4, {config.d_in})",
    ]
    before, after = _token_norm(config)
    lines += before
    source = "h" if before else "x"
    centred = f'({source} - w["b_dec"])' if config.apply_b_dec_to_input else source
    bias = "b_gate" if config.architecture == "gated" else "b_enc"
    lines.append(f'pre = {centred} @ w["W_enc"] + w["{bias}"]  # [4, {config.d_sae}]')
    lines += _select(config)
    lines.append('x_hat = z @ w["W_dec"] + w["b_dec"]')
    return "\n".join(lines + after)


def _select(config: SAEConfig) -> list[str]:
    if config.architecture == "topk":
        values = "values.relu()" if config.topk_relu else "values  # signed: no ReLU"
        scatter = "z = torch.zeros_like(pre).scatter_(-1, indices, {})"
        return [
            f"values, indices = pre.topk({config.k}, dim=-1)",
            scatter.format("values.relu()") if config.topk_relu else scatter.format("values") + values[len("values") :],
        ]
    if config.architecture == "jumprelu":
        return ['z = pre.relu() * (pre > w["threshold"])']
    if config.architecture == "gated":
        return ['magnitude = (pre - w["b_gate"]) * w["r_mag"].exp() + w["b_mag"]', "z = magnitude.relu() * (pre > 0)"]
    if config.architecture == "batch_topk" and config.threshold is not None:
        # SAELens' tensors of such an SAE hold the threshold too; the number here is what hubsae uses
        return [f"z = pre.relu() * (pre > {config.threshold!r})"]
    if config.architecture == "batch_topk":
        return [
            f"keep = pre.relu().flatten().topk({config.k} * len(x)).values.min()  # over the whole batch",
            "z = pre.relu() * (pre >= keep)",
        ]
    return ["z = pre.relu()"]


def _token_norm(config: SAEConfig) -> tuple[list[str], list[str]]:
    if config.token_norm == "none":
        return [], []
    undo = ["x_hat = x_hat * scale + mean"]
    if config.token_norm == "layer_norm":
        return [
            "mean = x.mean(-1, keepdim=True)",
            "scale = (x - mean).std(-1, keepdim=True)",
            "h = (x - mean) / (scale + 1e-5)",
        ], undo
    root = f" / {config.d_in} ** 0.5" if config.token_norm == "constant_norm" else ""
    return ["mean = 0.0", f"scale = x.norm(dim=-1, keepdim=True){root}", "h = x / scale"], undo
