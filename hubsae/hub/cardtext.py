"""Words and numbers for cards: escaping by place, formatting, summaries over many SAEs.

Whatever a record says may come from a stranger's file. `cell`, `code`, `literal`, `target` and `prose` each make it
harmless for one kind of place: a table cell or line, a code span, a string in a snippet, an address, a paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from hubsae.core.metadata import Metadata, Section
from hubsae.core.text import printable
from hubsae.formats.saelens_config import fidelity

T = TypeVar("T")

_ARCHITECTURES = {"relu": "ReLU", "topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU"}
_LABELS = {
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
    "exclude": "tokens left out",
    "massive_above": "massive above norm",
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


# -- text from records, harmless where it stands -----------------------------------------------------------------


def plain(value: Any) -> str:
    """Text on one line with nothing invisible in it, for YAML and as the start of the others."""
    return printable(" ".join(str(value).split()))


def cell(value: Any) -> str:
    """Text for one cell of a table, or within a line: no column separators, no markup of its own.

    >>> cell("a|b <script>\\n# x")
    'a\\\\|b &lt;script> # x'
    """
    if value is None or value == "":
        return "–"
    text = plain(number(value)).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "'").replace("[", "\\[").replace("]", "\\]")


def code(value: Any) -> str:
    """Text as a code span, in tables too.

    >>> code("saes/layer6"), code("a`b|c")
    ('`saes/layer6`', "`a'b\\\\|c`")
    """
    return "`" + (plain(value).replace("`", "'").replace("|", "\\|") or " ") + "`"


def literal(value: Any) -> str:
    """A string as Python reads it back, on one line.

    >>> literal("me/x"), literal('a"+evil()+"')
    ('"me/x"', '"a\\\\"+evil()+\\\\""')
    """
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("<!--", "\\x3c!--")
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text) + '"'


def target(value: Any) -> str:
    """A path or id as the address of a link."""
    return quote(str(value), safe="/@+=,:._-")


def prose(value: Any) -> str:
    """A person's own paragraphs: Markdown stays, raw HTML and what is left open do not.

    >>> prose("see <https://a.b> and <img src=x>")
    'see <https://a.b> and &lt;img src=x>'
    """
    lines = re.split(r"\r\n?|\n", str(value))
    text = "\n".join(printable(line.replace("\t", "    ")).rstrip() for line in lines).strip()
    text = re.sub(r"<(?!https?://[^\s<>]*>)(?=[A-Za-z/!?])", "&lt;", text)
    fences = re.findall(r"^ {0,3}(```+|~~~+)", text, re.M)
    return f"{text}\n{fences[-1]}" if len(fences) % 2 else text


# -- numbers -----------------------------------------------------------------------------------------------------


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
    try:
        return number(float(text)) if "." in text else text
    except ValueError:
        return text


def number_range(values: Sequence[int]) -> str:
    """The least and the greatest of sorted numbers; a dash for none.

    >>> number_range([10, 2000])
    '10 to 2,000'
    """
    return " to ".join(dict.fromkeys(number(v) for v in (*values[:1], *values[-1:]))) or "–"


def listing(values: Sequence[Any], most: int = 12) -> str:
    """Values as a list in a sentence.

    >>> listing([6, 12, 18, 23])
    '6, 12, 18 and 23'
    """
    texts = [printable(v) for v in values]
    if len(texts) > most:
        return f"{', '.join(texts[: most - 1])}, … {texts[-1]} ({len(texts)} in all)"
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def unique(values: Iterable[T | None]) -> list[T]:
    """The distinct values that are not None, in order of appearance."""
    return list(dict.fromkeys(value for value in values if value is not None))


# -- summaries over many SAEs ------------------------------------------------------------------------------------


def architecture_name(name: str) -> str:
    """An architecture as papers write it.

    >>> architecture_name("batch_topk")
    'BatchTopK'
    """
    return _ARCHITECTURES.get(name, name)


def facts(section: str, records: Sequence[Metadata]) -> list[tuple[str, str]]:
    """(label, value) for everything a section of the metadata records, over all SAEs of a release; ready for a cell."""
    values: dict[str, list[Any]] = {}
    for record in records:
        part = getattr(record, section)
        for name, value in part or ():
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
        rows.append((label or cell(name.replace("_", " ")), text))
    return rows


def _summary(values: list[Any]) -> str:
    distinct = unique(_flat(value) for value in values)
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
        short = {key: re.sub(r"^([0-9a-f]{12})[0-9a-f]{28,}$", r"\1…", str(item)) for key, item in value.items()}
        return ", ".join(f"{key} {item}" for key, item in short.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return value


def not_recorded(records: Sequence[Metadata]) -> list[str]:
    """What a reader would want to know and no SAE of the release says."""
    return [label for label, get in _WANTED if not any(get(m) for m in records)]


def saelens_limits(metadata: Metadata) -> str | None:
    """What stock SAELens gets instead of this SAE, or None where it computes the same."""
    known = fidelity(metadata.config)
    return None if known.exact else known.note
