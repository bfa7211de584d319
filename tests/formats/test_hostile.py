"""Bad input: every case is a typed error that names the file, and nothing is executed or half-written."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError, FormatError, HubSAEError, MetadataError
from hubsae.formats import Release, detect, package, plan, read, write
from hubsae.formats import tensors as io

CONFIG = SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4)


@pytest.fixture
def folder(tmp_path):
    return write(HubSAE.random(CONFIG), tmp_path / "sae")


def refused(path, *parts, kind=FormatError, **overrides):
    with pytest.raises(kind) as caught:
        read(path, **overrides)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    return text


def test_truncated_safetensors(folder):
    file = folder / "sae_weights.safetensors"
    whole = file.read_bytes()
    for size in (1, 7, 8, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(folder, str(file), "safetensors")


def test_bit_flips_are_an_error_or_change_no_shape(folder, tmp_path):
    release = Release.create(tmp_path / "r", name="r")
    release.add(HubSAE.random(CONFIG), "a")
    file = release.folder("a") / "sae_weights.safetensors"
    whole = file.read_bytes()
    dice = random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in [
        *range(16),
        *(dice.randrange(header) for _ in range(60)),
        *(dice.randrange(len(whole)) for _ in range(20)),
    ]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        try:
            sae = read(release.folder("a"))
        except HubSAEError as error:
            assert "sae_weights.safetensors" in str(error)
        else:
            assert sae.W_enc.shape == (16, 64)
        # a flip in the numbers can only be told by the hash, which a verified load compares
        with pytest.raises(HubSAEError, match=r"sae_weights\.safetensors"):
            release.load("a", verify=True)
    file.write_bytes(whole)
    release.load("a", verify=True)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["bare", "in a state dict", "torch", "torch legacy"])
def test_hostile_pickle_is_not_executed(form, tmp_path):
    mark, file = tmp_path / "executed", tmp_path / "sae_base_layer6.pt"
    value = Payload(mark) if form == "bare" else {"state_dict": {"b_pre": Payload(mark)}, "config": {}}
    if form.startswith("torch"):
        torch.save(value, file, _use_new_zipfile_serialization=form == "torch")
    else:
        file.write_bytes(pickle.dumps(value))
    for action in (read, detect, lambda p: plan(tmp_path)):
        with pytest.raises(FormatError) as caught:
            action(file)
        assert str(file) in str(caught.value)
        assert "PyTorch 2.6" not in str(caught.value)
    if form.startswith("torch"):
        with pytest.raises(FormatError, match=r"posix\.system"):
            read(file)
    assert not mark.exists()


def test_tensor_that_claims_more_than_the_file_holds(tmp_path):
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)  # 4 TiB by its shape, 4 bytes on disk
    torch.save({"W_enc": huge, "W_dec": huge, "b_enc": torch.zeros(4), "b_dec": torch.zeros(4)}, tmp_path / "relu.pt")
    refused(tmp_path / "relu.pt", "backed by bytes", "exhaust memory")


def test_npz_with_objects_or_that_inflates_without_measure(tmp_path):
    np.savez(tmp_path / "params.npz", w_enc=np.array([{"a": 1}], dtype=object))
    refused(tmp_path / "params.npz", "never read")
    names = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    shapes = ((3000, 3000), (3000, 3000), (3000,), (3000,), (3000,))
    np.savez_compressed(
        tmp_path / "params.npz", **{n: np.zeros(s, np.float32) for n, s in zip(names, shapes, strict=True)}
    )
    refused(tmp_path / "params.npz", "when unpacked")
    assert io.npz_shapes(tmp_path / "params.npz")["w_enc"] == shapes[0], "what is in it may be looked at"
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("w_enc.npy", b"nonsense")
    refused(tmp_path / "params.npz", "npz archive")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_weights_that_are_not_finite(folder, name, bad):
    tensors = {n: t.clone() for n, t in read(folder).tensors().items()}
    tensors[name].view(-1)[3] = bad
    save_file(tensors, folder / "sae_weights.safetensors")
    refused(folder, name, "1 of", "NaN or infinite")
    sae = HubSAE(CONFIG, tensors)
    for form in ("native",):
        with pytest.raises(FormatError, match="finite"):
            write(sae, folder.parent / "new", form)
        assert not (folder.parent / "new").exists()


def test_large_finite_weights_are_not_taken_for_infinite(folder):
    tensors = {n: t.clone() for n, t in read(folder).tensors().items()}
    tensors["W_dec"].fill_(3e38)  # the sum overflows, no value does
    save_file(tensors, folder / "sae_weights.safetensors")
    assert float(read(folder).W_dec.detach()[0, 0]) == pytest.approx(3e38)


def test_wrong_shapes_and_transposed_matrices(folder, tmp_path):
    tensors = {n: t.clone() for n, t in read(folder).tensors().items()}
    turned = {**tensors, "W_enc": tensors["W_enc"].t().contiguous(), "W_dec": tensors["W_dec"].t().contiguous()}
    save_file(turned, folder / "sae_weights.safetensors")
    refused(folder, "W_enc has shape (64, 16), expected (16, 64)", "transposed")
    save_file({**tensors, "b_enc": torch.zeros(63)}, folder / "sae_weights.safetensors")
    refused(folder, "b_enc has shape (63,)")
    save_file({**tensors, "norm_mean": torch.zeros(16)}, folder / "sae_weights.safetensors")
    refused(folder, "norm_mean")
    save_file({n: t for n, t in tensors.items() if n != "b_enc"}, folder / "sae_weights.safetensors")
    refused(folder, "missing: b_enc")
    state = {"b_pre": torch.zeros(16), "encoder.weight": torch.zeros(16, 64), "encoder.bias": torch.zeros(64),
             "decoder.weight": torch.zeros(64, 16), "decoder.bias": torch.zeros(16)}  # fmt: skip
    torch.save({"state_dict": state, "config": {"k": 4}}, tmp_path / "sae_a_layer1.pt")
    refused(tmp_path / "sae_a_layer1.pt", "both transposed")
    state["encoder.weight"], state["decoder.weight"] = torch.zeros(64, 16), torch.zeros(16, 60)
    torch.save({"state_dict": state, "config": {"k": 4}}, tmp_path / "sae_a_layer1.pt")
    refused(tmp_path / "sae_a_layer1.pt", "(64, 16) and (16, 60)")


def test_empty_folder_empty_file_and_nothing_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "an empty folder")
    with pytest.raises(FormatError, match="an empty folder"):
        package(tmp_path / "empty", tmp_path / "out", base_model="a/b")
    for name in ("zero.pt", "zero.safetensors", "params.npz", "sae_a_layer1.pt"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, name, "0 bytes")
    refused(tmp_path / "nowhere", "nothing at that path")
    with pytest.raises(FormatError, match="0 bytes"):
        package(tmp_path, tmp_path / "out", base_model="a/b")
    assert not (tmp_path / "out").exists()


def test_zero_byte_weights_beside_good_records(folder):
    (folder / "sae_weights.safetensors").write_bytes(b"")
    refused(folder, "sae_weights.safetensors", "0 bytes")


def test_metadata_from_the_future_is_kept_unless_it_changes_the_numbers(folder):
    data = json.loads((folder / "metadata.json").read_text())
    future = data | {"hubsae_format": 9, "quantisation": {"bits": 4}, "training": {"curriculum": "x"}}
    (folder / "metadata.json").write_text(json.dumps(future))
    with pytest.warns(UserWarning, match="metadata format 9"):
        sae = read(folder)
    sae.save_pretrained(folder.parent / "again")
    kept = json.loads((folder.parent / "again" / "metadata.json").read_text())
    assert kept["quantisation"] == {"bits": 4} and kept["training"]["curriculum"] == "x"
    (folder / "metadata.json").write_text(json.dumps(future | {"config": data["config"] | {"power": 2}}))
    with pytest.warns(UserWarning), pytest.raises(MetadataError, match="power"):
        read(folder)


def test_metadata_that_lacks_or_contradicts(folder):
    data = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({k: v for k, v in data.items() if k != "config"}))
    refused(folder, "config", kind=MetadataError)
    (folder / "metadata.json").write_text(json.dumps(data | {"config": data["config"] | {"d_sae": 128}}))
    refused(folder, "sae_weights.safetensors", "(16, 128)")
    (folder / "metadata.json").write_text('{"hubsae_format": 1, ')
    refused(folder, "metadata.json", "JSON")


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b", "C:\\x", "a\\..\\b", ""])
def test_paths_that_climb_out_of_a_release(tmp_path, path):
    release = Release.create(tmp_path / "r", name="r")
    release.add(HubSAE.random(CONFIG), "a")
    data = json.loads((tmp_path / "r" / "config.json").read_text())
    for field in ("path", "id"):
        bad = json.loads(json.dumps(data))
        bad["saes"][0][field] = path
        (tmp_path / "r" / "config.json").write_text(json.dumps(bad))
        with pytest.raises(MetadataError, match=f"saes.0.{field}"):
            Release.open(tmp_path / "r")
    bad = json.loads(json.dumps(data))
    bad["saes"][0]["files"][0]["path"] = path
    (tmp_path / "r" / "config.json").write_text(json.dumps(bad))
    with pytest.raises(MetadataError):
        Release.open(tmp_path / "r")
    if path:
        with pytest.raises(FormatError):
            release.add(HubSAE.random(CONFIG), path)
    assert not (tmp_path / "outside").exists()


def test_link_to_a_folder_elsewhere_is_not_followed(folder, tmp_path):
    secret = tmp_path / "secret"
    write(HubSAE.random(CONFIG), secret / "sae")
    source = tmp_path / "source"
    write(HubSAE.random(CONFIG), source / "layers.3", "sparsify")
    (source / "link").symlink_to(secret)
    assert [item.source.name for item in plan(source).saes] == ["layers.3"]


def test_text_and_other_things_that_are_not_weights(tmp_path):
    (tmp_path / "notes.pt").write_text("hello, I am a text file")
    refused(tmp_path / "notes.pt", "notes.pt")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 12) + b'{"a": [1, 2]')
    refused(tmp_path / "x.safetensors", "x.safetensors", "header")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "list")
    save_file({"weird": torch.zeros(2)}, tmp_path / "y.safetensors")
    refused(tmp_path / "y.safetensors", "tensors weird")
    refused(tmp_path / "list.pt", "nearest", kind=ConfigError, format="rl_chian")


def test_a_killed_write_leaves_the_old_file(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        HubSAE.random(CONFIG, seed=1).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
