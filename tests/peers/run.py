"""The matrix of peers: `python -m tests.peers.run [PEER ...]` makes an environment for each, runs it on a release, and
writes the table into docs/formats.md.

    release of five architectures -> an environment per peer -> inside/on_PEER.py -> docs/formats.md

What a peer needs is installed by pip (its settings, such as PIP_CONSTRAINT, are yours). Environments are kept, and so
is what came of each peer: those that are not named keep their rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hubsae import HubSAE, SAEConfig
from hubsae.core.files import read_json, write_json_atomic, write_text_atomic
from hubsae.formats import Release, read, write

from . import loaders
from .inside.names import NAMES, VOCABULARY

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
PEERS: dict[str, tuple[str, ...]] = {
    "sae_lens": (),
    "sae_dashboard": ("sae-dashboard>=0.8", "sae-lens", "pyarrow<21"),  # later ones want a numpy that it does not
    "sae_bench": ("sae-bench>=0.6",),
    "nnsight": ("nnsight>=0.5", "transformers", "accelerate"),
    "sparsify": ("eai-sparsify>=1.3",),
    "dictionary_learning": ("dictionary-learning>=0.1",),
}
"""What pip installs for each; nothing: it runs in this environment."""
D, D_SAE, K = 32, 128, 8


def make_work(work: Path) -> None:
    """A release, exports, a model and a tokenizer, with what hubsae computes of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    g = torch.Generator().manual_seed(0)
    x, expected = torch.randn(400, D, generator=g) + 0.3, {}
    release = Release.create(work / "release", name="release", base_model="local/tiny")
    for seed, name in enumerate(NAMES):
        extra: dict[str, Any] = {"k": K} if "topk" in name else {}
        extra |= {"threshold": 0.7} if name == "batch_topk" else {}
        sae = HubSAE.random(SAEConfig(architecture=name, d_in=D, d_sae=D_SAE, **extra), seed=seed)  # pyright: ignore
        with torch.no_grad():
            sae.b_dec.copy_(0.1 * torch.randn(D, generator=g))
        sae.metadata.hook.layer, sae.metadata.hook.module_path = 1, "model.layers.1"
        sae.metadata.hook.transformer_lens, sae.metadata.hook.context_size = "blocks.1.hook_resid_post", 24
        sae.metadata.hook.prepend_bos, sae.metadata.base_model.id = False, "local/tiny"
        release.add(sae, name, also=["sparsify"] if name == "topk" else [])
        if name in ("relu", "topk", "batch_topk"):
            write(sae, work / "dictionary_learning" / name, "dictionary_learning")
        expected |= {f"{name}/latents": sae.encode(x), f"{name}/output": sae(x)}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    model.save_pretrained(work / "model")
    ids, sae = torch.randint(3, VOCABULARY, (2, 16), generator=g), release.load("relu")
    with torch.no_grad(), sae.attach(model, 1) as seen:  # pyright: ignore[reportAttributeAccessIssue]
        model(ids)
    with torch.no_grad(), sae.splice(model, 1):  # pyright: ignore[reportAttributeAccessIssue]
        expected |= {"ids": ids, "attach/latents": seen.dense(), "splice/output": model(ids).logits}
    save_file({k: v.contiguous() for k, v in (expected | {"x": x}).items()}, work / "expected.safetensors")
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w1", eos_token="w2", pad_token="w0")
    made.save_pretrained(work / "tokenizer")
    file = work / "tokenizer" / "tokenizer_config.json"  # under the name that every version of transformers knows
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def python_of(peer: str, envs: Path) -> Path:
    """The interpreter of a peer's environment, which is made where it is not there."""
    if not PEERS[peer]:
        return Path(sys.executable)
    python = envs / peer / "bin" / "python"
    if not python.is_file():
        venv.create(envs / peer, with_pip=True)
    if subprocess.run([python, "-c", f"import {peer}"], capture_output=True, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        # nothing here needs it, and one that was built for another torch than this keeps transformers from loading
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    return python


def run_peer(peer: str, work: Path, envs: Path) -> dict[str, Any]:
    """What came of a peer: its version, and a result for every check."""
    try:
        python = python_of(peer, envs)
    except subprocess.CalledProcessError as error:
        return {"version": "", "checks": {"install": ("fails", f"pip ended with {error.returncode}")}}
    done = subprocess.run(
        [python, HERE / "inside" / f"on_{peer}.py", work], capture_output=True, text=True, check=False, cwd=work
    )
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith('{"version"')), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"version": "", "checks": {"import": ("fails", last)}}
    if '"fails"' in line:
        sys.stderr.write(done.stderr)
    found = json.loads(line)
    for folder in sorted((work / "written").glob("*")) if peer == "dictionary_learning" else ():
        found["checks"][f"its own {folder.name}"] = _read_back(folder, load_file(work / "expected.safetensors")["x"])
    return found


def _read_back(folder: Path, x: torch.Tensor) -> tuple[str, str]:
    """Whether hubsae reads what a peer wrote with the peer's numbers."""
    sae, numbers = read(folder), load_file(folder / "numbers.safetensors")
    support = bool(((sae.encode(x) != 0) == (numbers["latents"] != 0)).all())
    far = float((sae(x) - numbers["output"]).norm() / numbers["output"].norm())
    return ("ok" if support and far < 1e-6 else "fails"), f"hubsae reads it, equal ({far:.0e})"


def table(found: dict[str, dict[str, Any]], layouts: dict[str, loaders.Outcome]) -> str:
    """The two tables as Markdown."""
    lines = ["| peer | what is done with a release | result |", "|---|---|---|"]
    for peer, result in found.items():
        by_result: dict[str, list[str]] = {}
        for what, (state, text) in result["checks"].items():
            by_result.setdefault(text if state == "ok" else f"fails: {text}", []).append(what)
        name = f"{peer} {result['version']} ({result['date']})"
        lines += [f"| {name} | {', '.join(names)} | {text} |" for text, names in by_result.items()]
    lines += ["", "| loader of SAELens' registry | hubsae beside it | latents | output |", "|---|---|---|---|"]
    for name, outcome in layouts.items():
        numbers = ["" if value is None else f"{value:.0e}" for value in outcome[1:]]
        lines.append(f"| `{name}` | {outcome.result} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the peers named (all of them), and write the tables into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "hubsae" / "peers")
    given = parser.parse_args()
    if unknown := set(given.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}")
    (given.envs / "results").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_work(work)
        for peer in given.peers or PEERS:
            print(f"{peer} ...", flush=True)
            result = run_peer(peer, work, given.envs) | {"date": date.today().isoformat()}
            write_json_atomic(given.envs / "results" / f"{peer}.json", result)
            for what, (state, text) in result["checks"].items():
                print(f"  {what}: {state}, {text}", flush=True)
        layouts = {name: loaders.compare(name, work / "loaders") for name in loaders.FILES}
    files = {peer: given.envs / "results" / f"{peer}.json" for peer in PEERS}
    text = table({peer: read_json(file) for peer, file in files.items() if file.is_file()}, layouts)
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    write_text_atomic(DOCS, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    print(f"written into {DOCS}")


if __name__ == "__main__":
    main()
