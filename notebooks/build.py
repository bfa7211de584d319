"""Build and execute the notebooks: `python notebooks/build.py`. Their source is here, the .ipynb files are output.

Each notebook is a list of cells; a cell that starts with `#:` is text. They need no network: the first cell starts a
local hub, and everything else is what one would type against huggingface.co.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent

HUB = """
import os, tempfile, warnings

warnings.filterwarnings("ignore")
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from hubsae import localhub

context = localhub.running(tokens={"me": "hf_me"})
hub = context.__enter__()
os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"] = hub.url, hub.token  # before huggingface_hub is imported
"""

NOTEBOOKS: dict[str, list[str]] = {
    "publish_and_load": [
        """#:# Publish SAEs and load them back

A folder of `.pt` files, as a training script leaves it, becomes a release: safetensors, a full record, a card. Then it
is loaded three ways: with hubsae, with stock SAELens, and with nothing but safetensors. No network is needed: the
first cell starts a Hub server on this machine; leave it out and the rest works against huggingface.co.""",
        HUB,
        """#:## A pile of pickles

Two layers, two stages of an RL run; the module is TopK without ReLU, and its decoder does not add `b_pre` back.""",
        """
from pathlib import Path

import torch

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp()) / "saes_k64"
folder.mkdir()
for layer in (6, 12):
    for stage in ("instruct_base", "ppo_step116"):
        decoder = torch.nn.functional.normalize(torch.randn(512, 64), dim=1)
        state = {
            "b_pre": 0.1 * torch.randn(64),
            "encoder.weight": decoder.clone(),
            "encoder.bias": torch.zeros(512),
            "decoder.weight": decoder.T.contiguous(),
            "decoder.bias": 0.1 * torch.randn(64),
        }
        config = {"d_model": 64, "d_sae": 512, "k": 16}
        torch.save({"state_dict": state, "config": config}, folder / f"sae_{stage}_layer{layer}.pt")
sorted(path.name for path in folder.iterdir())
""",
        """#:## The plan

`dry_run=True` packages, verifies and shows what would be done. With activations it also says whether the missing ReLU
ever matters.""",
        """
import hubsae

activations = torch.randn(2000, 64)
about = dict(base_model="Qwen/Qwen2.5-0.5B-Instruct", hook="model.layers.{layer}", license="apache-2.0")
plan = hubsae.push(folder, "me/chain", dry_run=True, check_saelens=False, **about).plan
print("\\n".join(plan.summary()))
for note in plan.notes:
    print("note:", note)
""",
        """#:The ReLU is a no-op where enough pre-activations are positive, so `topk_relu=True` publishes plain TopK, which SAELens
computes exactly. This time the check against stock SAELens is on.""",
        """
result = hubsae.push(folder, "me/chain", choices={"topk_relu": True}, tag="v1.0", **about)
for row in result.plan.rows:
    print(row.id, "|", row.selection, "| SAELens:", row.check.saelens, f"(relative error {row.check.saelens_error:.1e})")
print(result.committed, result.tag)
""",
        """again = hubsae.push(folder, "me/chain", choices={"topk_relu": True}, check_saelens=False, **about)
print("committed again:", again.committed)""",
        """#:## What is there""",
        """hubsae.list_saes("me/chain")""",
        """#:## Load: hubsae""",
        """
from hubsae import HubSAE

sae = HubSAE.from_pretrained("me/chain@v1.0", layer=12, stage="ppo_step116")
x = torch.randn(8, sae.d_in)
codes = sae.encode_sparse(x)
print(sae)
print(codes.indices.shape, codes.values.shape)
""",
        """#:## Load: stock SAELens""",
        """
import logging

logging.disable(logging.WARNING)

from sae_lens import SAE

lens = SAE.from_pretrained("me/chain", "saes_k64/ppo_step116/layer12")
with torch.no_grad():
    z, x_hat = lens.encode(x), lens(x)
same = ((z != 0) == (codes.dense() != 0)).all().item()
error = ((x_hat - sae(x)).norm(dim=-1) / x_hat.norm(dim=-1)).max().item()
print("same latents:", same, "| relative error below 1e-6:", error < 1e-6)
print(lens.cfg.metadata.hook_name, "|", lens.cfg.metadata.model_name)
""",
        """#:## Load: nothing but safetensors

The card prints this code for each release; here it is taken from the card and run.""",
        """
import re

from huggingface_hub import hf_hub_download

card = Path(hf_hub_download("me/chain", "README.md")).read_text()
code = next(c for c in re.findall(r"```python\\n(.*?)```", card, re.S) if "load_file" in c)
print(code)
exec(code)
print(x_hat.shape)
""",
        """#:## A person's words on the card survive the next push""",
        """
from huggingface_hub import upload_file

mine = card.replace("## Limitations", "I trust layer 12 most.\\n\\n## Limitations", 1)
upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="me/chain")
hubsae.push(folder, "me/chain", choices={"topk_relu": True}, title="SAEs along a PPO run", check_saelens=False, **about)
text = Path(hf_hub_download("me/chain", "README.md")).read_text()
print("I trust layer 12 most." in text, "# SAEs along a PPO run" in text)
""",
        """_ = context.__exit__(None, None, None)""",
    ],
    "in_a_model": [
        """#:# Read, replace and steer inside a model

An SAE loaded from the Hub is attached to a `transformers` model at the hook point its record names. The model here is
a tiny Qwen2 made on the spot; with a real one only the names change.""",
        HUB,
        """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
model = Qwen2ForCausalLM(
    Qwen2Config(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
).eval()
batch = {"input_ids": torch.randint(3, 256, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
""",
        """#:An SAE for layer 2, published and loaded back: its hook point comes with it.""",
        """
from hubsae import HubSAE, SAEConfig

made = HubSAE.random(SAEConfig(architecture="topk", d_in=64, d_sae=512, k=16))
made.metadata.base_model.id = "me/tiny-qwen"
made.metadata.hook.layer, made.metadata.hook.module_path = 2, "model.layers.2"
made.push_to_hub("me/layer2", check_saelens=False)

sae = HubSAE.from_pretrained("me/layer2")
print(sae)
""",
        """#:## Read the codes""",
        """
with sae.attach(model) as acts, torch.no_grad():
    model(**batch)
print(acts.codes.indices.shape, "latents of the first token:", acts.codes.indices[0, 0, :5].tolist())
""",
        """#:## Replace the activations by their reconstruction

How much the next-token prediction changes is the price of the SAE. (This one is untrained, so it is high.)""",
        """
import torch.nn.functional as F

def loss() -> float:
    with torch.no_grad():
        logits = model(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()).item()

clean = loss()
with sae.splice(model):
    spliced = loss()
print(f"clean {clean:.3f}, with the SAE {spliced:.3f}; afterwards {loss():.3f} again")
""",
        """#:## Steer

Add a feature's direction while the model generates.""",
        """
options = dict(max_new_tokens=8, do_sample=False)
plain = model.generate(**batch, **options)[0, 12:]
with sae.steer(model, feature=5, strength=40.0, unit=False):
    steered = model.generate(**batch, **options)[0, 12:]
print("plain:  ", plain.tolist())
print("steered:", steered.tolist())
print("different:", not torch.equal(plain, steered))
""",
        """#:## The same SAE in SAELens""",
        """
import logging

logging.disable(logging.WARNING)

from sae_lens import SAE

lens = SAE.from_pretrained("me/layer2", ".")  # "." is the root of the repo
x = torch.randn(16, 64)
with torch.no_grad():
    print("same reconstruction:", torch.allclose(lens(x), sae(x), atol=1e-6))
""",
        """_ = context.__exit__(None, None, None)""",
    ],
}


def notebook(name: str) -> nbformat.NotebookNode:
    """A notebook without outputs."""
    cells = []
    for number, source in enumerate(NOTEBOOKS[name]):
        text = source.strip()
        make = nbformat.v4.new_markdown_cell if text.startswith("#:") else nbformat.v4.new_code_cell
        cells.append(make(text.removeprefix("#:"), id=f"cell-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(name: str, timeout: int = 300) -> nbformat.NotebookNode:
    """Run a notebook; the first error of a cell is raised."""
    node = notebook(name)
    NotebookClient(node, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in node.cells:
        cell.metadata.pop("execution", None)  # times of this machine
    return node


def main() -> None:
    """Write the notebooks named on the command line, or all."""
    for name in sys.argv[1:] or NOTEBOOKS:
        nbformat.write(execute(name), HERE / f"{name}.ipynb")
        print(HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
