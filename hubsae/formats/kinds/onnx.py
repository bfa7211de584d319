"""ONNX export: x [tokens, d_in] to `reconstruction` [tokens, d_in] and `latents` [tokens, d_sae].

The graph is written node by node, so the same SAE always gives the same bytes, and is checked against torch
with onnxruntime before the file appears. The number of tokens is dynamic.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.extras import require
from hubsae.core.files import atomic_path
from hubsae.core.sae import LAYER_NORM_EPS, NORM_FLOOR, SAE
from hubsae.formats.base import Format
from hubsae.version import __version__

# Everything used has been stable since opset 18; 21 is read by every onnxruntime since 1.18.
OPSET = 21
IR_VERSION = 10
# protobuf messages end at 2 GiB; larger weights go to a file beside the graph
EXTERNAL_FROM = 1_800_000_000
TOLERANCE = 1e-4


def write(sae: SAE, path: str | os.PathLike[str], *, verify: bool = True) -> Path:
    """Export to `path`; large weights go to `path` + `.data` beside it."""
    onnx = require("onnx", extra="onnx")
    if sae.config.architecture == "batch_topk" and sae.config.threshold is None:
        raise ConfigError(
            "batch_topk without a stored threshold depends on the whole batch and is not exported to ONNX",
            hint="estimate a threshold first: hubsae.formats.estimate_threshold(sae, activations)",
        )
    if sae.config.skip:
        raise ConfigError("a transcoder with a skip matrix is not exported to ONNX", hint="write it as native")
    path = Path(path)
    model = _model(onnx, sae)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        target = Path(scratch) / path.name
        size = sum(t.numel() * 4 for t in sae.tensors().values())
        if size > EXTERNAL_FROM:
            onnx.save_model(model, str(target), save_as_external_data=True, location=f"{path.name}.data")
        else:
            onnx.save_model(model, str(target))
        onnx.checker.check_model(str(target))
        if verify:
            check(sae, target)
        data = target.with_name(f"{path.name}.data")
        if data.exists():
            os.replace(data, path.with_name(data.name))
        with atomic_path(path) as temporary:
            shutil.move(target, temporary)
    return path


def check(sae: SAE, path: str | os.PathLike[str], *, tokens: int = 33, seed: int = 0) -> float:
    """Run the file with onnxruntime on probe activations; returns the largest relative reconstruction error."""
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    cpu = SAE.build(
        sae.config.model_copy(update={"dtype": "float32"}), {n: t.float().cpu() for n, t in sae.tensors().items()}
    )
    start = torch.zeros(sae.d_in) if sae.config.is_transcoder else cpu.b_dec.detach()
    x = start + torch.randn(tokens, sae.d_in, generator=torch.Generator().manual_seed(seed))
    worst = 0.0
    for part in (x, x[:1]):  # two sizes, since the first dimension is dynamic
        got = torch.from_numpy(session.run(["reconstruction"], {"x": part.numpy()})[0])
        want = cpu(part)
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-30)))
    if not worst <= TOLERANCE:
        raise FormatError(path, f"the reconstruction of torch within {TOLERANCE}", f"a relative error of {worst:.2g}")
    return worst


def _model(onnx: Any, sae: SAE) -> Any:
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    FLOAT = onnx.TensorProto.FLOAT
    config = sae.config
    weights = {name: t.detach().cpu().float().contiguous().numpy() for name, t in sae.tensors().items()}
    constants = [array(value, name) for name, value in weights.items()]
    nodes: list[Any] = []

    def constant(name: str, value: Any, dtype: torch.dtype) -> str:
        constants.append(array(torch.tensor(value, dtype=dtype).numpy(), name))
        return name

    def node(kind: str, *inputs: str, to: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [to], name=to, **attributes))
        return to

    inner = _token_norm(config.token_norm, config.d_in, node, constant) if config.token_norm != "none" else "x"
    centred = node("Sub", inner, "b_dec", to="centred") if config.apply_b_dec_to_input else inner
    product = node("MatMul", centred, "W_enc", to="product")
    zero = constant("zero", 0.0, torch.float32)
    last = "reconstruction" if config.token_norm == "none" else "decoded"
    if config.architecture == "gated":
        open_gate = node("Greater", node("Add", product, "b_gate", to="gate"), zero, to="open")
        scale = node("Exp", "r_mag", to="scale")
        magnitude = node(
            "Relu", node("Add", node("Mul", product, scale, to="scaled"), "b_mag", to="mag"), to="magnitude"
        )
        node("Where", open_gate, magnitude, zero, to="latents")
    else:
        pre = node("Add", product, "b_enc", to="pre")
        if config.architecture == "relu":
            node("Relu", pre, to="latents")
        elif config.architecture == "topk":
            k = constant("k", [config.k], torch.int64)
            nodes.append(helper.make_node("TopK", [pre, k], ["top_values", "top_indices"], name="top", axis=1))
            values = node("Relu", "top_values", to="values") if config.topk_relu else "top_values"
            empty = node("Mul", pre, zero, to="empty")
            node("ScatterElements", empty, "top_indices", values, to="latents", axis=1)
        else:
            cut = "threshold" if config.architecture == "jumprelu" else constant("cut", config.threshold, torch.float32)
            node("Where", node("Greater", pre, cut, to="active"), node("Relu", pre, to="rectified"), zero, to="latents")
    node("Add", node("MatMul", "latents", "W_dec", to="decoder_product"), "b_dec", to=last)
    if config.token_norm != "none":
        node("Add", node("Mul", last, "token_scale", to="rescaled"), "token_mean", to="reconstruction")
    graph = helper.make_graph(
        nodes,
        "sae",
        [helper.make_tensor_value_info("x", FLOAT, ["tokens", config.d_in])],
        [
            helper.make_tensor_value_info("reconstruction", FLOAT, ["tokens", config.width_out]),
            helper.make_tensor_value_info("latents", FLOAT, ["tokens", config.d_sae]),
        ],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="hubsae", producer_version=__version__
    )
    model.ir_version = IR_VERSION
    meta = sae.metadata
    helper.set_model_props(
        model,
        {
            "config": config.model_dump_json(exclude_none=True),
            "hook_point": meta.hook.module_path or "",
            "base_model": meta.base_model.id or "",
        },
    )
    return model


def _token_norm(kind: str, d_in: int, node: Any, constant: Any) -> str:
    axes = constant("axes", [1], torch.int64)
    if kind == "layer_norm":
        mean = node("ReduceMean", "x", axes, to="token_mean", keepdims=1)
        away = node("Sub", "x", mean, to="away")
        square = node("ReduceSumSquare", away, axes, to="square", keepdims=1)
        variance = node("Div", square, constant("degrees", float(d_in - 1), torch.float32), to="variance")
        scale = node("Sqrt", variance, to="token_scale")
        return node(
            "Div", away, node("Add", scale, constant("eps", LAYER_NORM_EPS, torch.float32), to="guarded"), to="normed"
        )
    constant("token_mean", 0.0, torch.float32)
    norm = node("ReduceL2", "x", axes, to="norm", keepdims=1)
    root = d_in**0.5 if kind == "constant_norm" else 1.0
    floored = node("Max", norm, constant("floor", NORM_FLOOR, torch.float32), to="floored")
    scale = node("Div", floored, constant("root", root, torch.float32), to="token_scale")
    return node("Div", "x", scale, to="normed")


FORMAT = Format(
    name="onnx",
    title="ONNX",
    write=write,
    write_beside=lambda sae, folder: write(sae, folder / "model.onnx"),
    suffix=".onnx",
    layout="`.onnx` (opset 21), inputs `x`, outputs `reconstruction` and `latents`",
)
