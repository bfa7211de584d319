"""Every reader returns or raises HubSAEError, soon and in little memory, whatever the files hold."""

from __future__ import annotations

import io
import json
import random
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import HubSAEError
from hubsae.formats import read, write

SECONDS, TIMES, FLOOR = 2.0, 4, 16 << 20  # of any one read; beside small files Python itself needs some
CONFIG = SAEConfig(architecture="topk", d_in=6, d_sae=12, k=2)
WORDS = [None, True, -1, 0, 10**40, 1e308, "", "\ud800", "../../x", "a" * 300, [], {}, [[[[]]]], {"a": {"b": 1}}]


def corpus(folder: Path) -> list[Path]:
    """One small, right example of each layout: what is damaged."""
    sae = HubSAE.random(CONFIG)
    for name in ("native", "saelens", "sparsify", "dictionary_learning", "raw"):
        write(sae, folder / name, name)
    write(sae, folder / "sae.pt", "pt")
    t = {n: torch.randn(s) for n, s in {"W_enc": (6, 12), "W_dec": (12, 6), "b_enc": (12,), "b_dec": (6,)}.items()}
    linear = {"encoder.weight": t["W_enc"].t().contiguous(), "encoder.bias": t["b_enc"],
              "decoder.weight": t["W_dec"].t().contiguous(), "decoder.bias": t["b_dec"]}  # fmt: skip
    gemma = {n.lower(): v for n, v in t.items()} | {"threshold": torch.rand(12)}
    (folder / "layer_3.safetensors").write_bytes(save({**t, "W_enc": linear["encoder.weight"]}))
    (folder / "linear.safetensors").write_bytes(save(linear))
    torch.save({"state_dict": linear | {"b_pre": t["b_dec"]}, "config": {"k": 2}}, folder / "sae_a_layer3.pt")
    torch.save({"sae_state_dict": t | {"log_threshold": t["b_enc"]}, "normalization_mean": t["b_dec"],
                "normalization_scale": 2.0}, folder / "jump.pt")  # fmt: skip
    torch.save({"pre_bias": t["b_dec"], "encoder.weight": linear["encoder.weight"], "latent_bias": t["b_enc"],
                "decoder.weight": linear["decoder.weight"], "activation": "ReLU"}, folder / "openai.pt")  # fmt: skip
    torch.save(t, folder / "layer3.sae.pt")
    for name, files in {
        "gemma_npz": {"params.npz": npz(gemma)},
        "gemma_2": {"params.safetensors": save(gemma), "config.json": {"hf_hook_point_in": "model.layers.3.output"}},
        "bundle": {"model.safetensors": save(t),
                   "model.metadata.json": {"k": 2, "input_mean": [0.0] * 6, "input_std": [1.0] * 6}},
        "llama": {"sae_weights.safetensors": save(linear),
                  "config.json": {"sae_type": "sae", "d_model": 6, "hook_point_in": "blocks.1.hook_resid_post",
                                  "norm_activation": "inference", "act_fn": "relu"}},
    }.items():  # fmt: skip
        (folder / name).mkdir()
        for file, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name / file).write_bytes(data)
    return sorted(path for path in folder.iterdir())


def npz(arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **{name: value.numpy() for name, value in arrays.items()})
    return out.getvalue()


def damaged(data: bytes, suffix: str, dice: random.Random) -> bytes:
    """A file with something wrong: cut, flipped, spliced, or with another value in its JSON."""
    kind = dice.randrange(4)
    if suffix == ".json" and kind < 3:
        value = json.loads(data)
        if isinstance(value, dict) and value:
            inner = value
            while dice.random() < 0.5 and (deeper := [v for v in inner.values() if isinstance(v, dict) and v]):
                inner = dice.choice(deeper)
            inner[dice.choice(list(inner))] = dice.choice(WORDS)
        return json.dumps(value).encode()
    if kind == 0:
        return data[: dice.randrange(len(data))]
    out = bytearray(data)
    if kind == 1:
        at = dice.randrange(len(out))
        out[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9)))
    else:
        for _ in range(dice.randrange(1, 5)):
            out[dice.randrange(min(len(out), 400 if kind == 2 else len(out)))] = dice.randrange(256)
    return bytes(out)


def checked(path: Path, *, memory: bool = True) -> None:
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
    start = time.process_time()
    if memory:  # costly to watch
        tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path, architecture="topk", k=2, apply_b_dec_to_input=True)
    except HubSAEError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        if memory:
            tracemalloc.stop()
    assert time.process_time() - start < SECONDS, f"{path} took {time.process_time() - start:.1f} s"
    assert peak < TIMES * size + FLOOR, f"{path} of {size} bytes took {peak}"


def run(rounds: int, seed: int) -> None:
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as d:
        examples = corpus(Path(d))
        for path in examples:
            checked(path)
        for number in range(rounds):
            path = dice.choice(examples)
            file = dice.choice([p for p in path.rglob("*") if p.is_file()]) if path.is_dir() else path
            whole = file.read_bytes()
            file.write_bytes(damaged(whole, file.suffix, dice))
            try:
                checked(path, memory=number % 10 == 0)
            except BaseException as error:
                raise AssertionError(f"round {number} of seed {seed}: {file.name}: {type(error).__name__}") from error
            finally:
                file.write_bytes(whole)


def test_damaged_files_are_read_or_refused():
    run(150, seed=0)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files_are_read_or_refused():
    run(100_000, seed=1)


def header(tensors: int) -> bytes:
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(tensors)}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def npy(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cfg.json", b"[" * 200_000),
        ("cfg.json", b'{"d_in": ' + b"9" * 10_000 + b', "d_sae": 4}'),
        ("cfg.json", b'{"d_in": 6, "d_sae": 12, "architecture": "\\ud800", "metadata": {"sae_lens_version": "6.0.0"}}'),
        ("metadata.json", b'{"hubsae_format": 1, "id": "\\ud800", "config": {"architecture": "\\ud800"}}'),
        ("sae_weights.safetensors", header(300_000)),
        ("W_enc.npy", npy("(1000000000000,)")),
        ("W_enc.npy", npy("(" * 90 + ")" * 90)),
    ],
)
def test_files_made_to_exhaust_are_refused(name, content, tmp_path):
    """Each ended in RecursionError, ValueError, UnicodeEncodeError, MemoryError, or after half a minute."""
    layout = "raw" if name.endswith(".npy") else "native" if name == "metadata.json" else "saelens"
    write(HubSAE.random(CONFIG), tmp_path, layout)
    if layout == "raw":
        (tmp_path / "tensors.json").unlink()
        (tmp_path / "W_enc").unlink()
    (tmp_path / name).write_bytes(content)
    start = time.process_time()
    with pytest.raises(HubSAEError) as caught:
        read(tmp_path, architecture="topk", k=2, apply_b_dec_to_input=True)
    str(caught.value).encode("utf-8", "strict")
    assert time.process_time() - start < 10 * SECONDS
