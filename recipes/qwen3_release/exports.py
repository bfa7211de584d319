"""The same weights in every format: each read back by its own reader and compared, and an inventory with lineage.

layer15/                  the ordinary release, which SAELens loads
layer15/model.safetensors, model.metadata.json      training space, input_mean and input_std in full
layer15/model.pt, model.onnx, raw/W_enc ...
release_manifest.json     every file with size and sha256, and where the weights come from
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae.core.extras import require
from hubsae.core.files import write_json_atomic
from hubsae.core.sae import SAE
from hubsae.formats import Release, read
from hubsae.recipes.steps import StepContext
from hubsae.train import TrainConfig
from hubsae.train.kept import Kept
from hubsae.version import __version__

PLACES = {"bundle": "", "pt": "model.pt", "onnx": "model.onnx", "raw": "raw"}
"""Where each export lies in the folder of its SAE."""
INVENTORY = "release_manifest.json"


def compare(folder: Path, exports: Sequence[str], x: Tensor) -> list[dict[str, Any]]:
    """How far each export's codes and reconstruction of x [tokens, d_in] are from the release's own.

    Rows on which two pre-activations at the edge of the top k are equal up to rounding may keep the other one: they are
    counted, and left out of the errors.
    """
    own = read(folder, "native")
    z, rebuilt = own.encode(x), own(x)
    rows = []
    for name in exports:
        other, mine = _codes(name, folder / PLACES[name], x)
        same = ((other != 0) == (z != 0)).all(1)
        rows.append(
            {
                "export": name, "reader": "onnxruntime" if name == "onnx" else f"hubsae ({name})", "tokens": len(x),
                "other_support": int((~same).sum()), "codes": _error(other[same], z[same]),
                "reconstruction": _error(mine[same], rebuilt[same]),
            }
        )  # fmt: skip
    return rows


def _codes(name: str, path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    if name == "onnx":
        session = require("onnxruntime", extra="onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        latents, rebuilt = session.run(["latents", "reconstruction"], {"x": x.numpy()})
        return torch.from_numpy(latents), torch.from_numpy(rebuilt)
    sae: SAE = read(path, name)
    return sae.encode(x), sae(x)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def write_inventory(release: Release, lineage: dict[str, Any]) -> Path:
    """`release_manifest.json`: what lies in the release, and what it was made from."""
    release.list_others()
    files = [file.model_dump() for file in release.manifest.all_files if file.path != INVENTORY]
    about = {"name": release.name, "hubsae": __version__, "lineage": lineage, "files": files}
    path = write_json_atomic(release.path / INVENTORY, about)
    release.list_others()
    return path


def lineage(ctx: StepContext, hook: str, training: TrainConfig, kept: Kept) -> dict[str, Any]:
    """Where the weights of a checkpoint come from."""
    about, subject = ctx.result("activations"), ctx.result("subject")
    return {
        "base_model": {"id": about["model"], "revision": subject.get("revision")}, "hook_point": hook,
        "texts": {"id": about["dataset"], "revision": subject.get("data_revision")},
        "activations": about["tokens"], "checkpoint": {"step": kept.step, "why": kept.why},
        "training": training.model_dump(mode="json"),
    }  # fmt: skip
