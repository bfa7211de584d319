"""Tensor files read without trust: nothing is executed, and nothing is believed about sizes.

Pickles are opened with `weights_only=True`; every tensor must be backed by bytes that are really in the file
(a view with stride 0 can claim terabytes); what is truncated, damaged or not finite is refused with an error
that names the file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hubsae.core import files
from hubsae.core.errors import FormatError
from hubsae.core.files import atomic_path, read_json
from hubsae.core.text import printable

Paths = str | os.PathLike[str]

MAX_JSON = 256 << 20
MAX_SAE_HEADER = 4 << 20
MAX_INFLATION = 32  # compressed archives of weights stay far below this
PICKLES = (".pt", ".pth", ".bin")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def require_file(path: Paths, what: str) -> Path:
    """The path, if a file with something in it lies there."""
    file = Path(path)
    if not file.is_file():
        raise FormatError(file, what, "a folder" if file.is_dir() else "no such file")
    if file.stat().st_size == 0:
        raise FormatError(file, what, "an empty file (0 bytes)", hint="download or copy it again")
    return file


@contextmanager
def _readable(file: Path, what: str) -> Iterator[None]:
    """Whatever a library trips over in a file is the file's fault: each raises errors of its own on damaged ones."""
    try:
        yield
    except (FormatError, MemoryError):
        raise
    except Exception as error:
        raise FormatError(
            file,
            what,
            f"one that cannot be read ({type(error).__name__}: {printable(str(error).partition(chr(10))[0], 160)})",
            hint="the file is truncated, damaged or of another kind; download it again",
        ) from error


def read_small_json(path: Paths) -> Any:
    """Read a JSON file that describes something, refusing one of absurd size."""
    file = require_file(path, "a JSON file")
    if file.stat().st_size > MAX_JSON:
        raise FormatError(file, f"JSON below {MAX_JSON >> 20} MiB", f"{file.stat().st_size >> 20} MiB")
    return read_json(file)


def read_small_yaml(path: Paths, most: int = 64 << 10) -> Any:
    """Read a YAML file of settings; anchors that multiply and files of absurd size are refused."""
    file = require_file(path, "a YAML file")
    if file.stat().st_size > most:
        raise FormatError(file, f"YAML below {most >> 10} KiB", f"{file.stat().st_size >> 10} KiB")
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8 too
        why = printable(" ".join(str(error).split()), 300)
        raise FormatError(file, "YAML", f"text that does not parse ({type(error).__name__}: {why})") from error


# ---- safetensors ------------------------------------------------------------------------------------------


def _few_tensors(path: Paths) -> Path:
    """The file, if its header is one of weights: parsing one of 300,000 names takes half a minute."""
    file = require_file(path, "a safetensors file")
    with file.open("rb") as handle:
        claimed = int.from_bytes(handle.read(8), "little")
    if MAX_SAE_HEADER < claimed < file.stat().st_size:
        raise FormatError(file, f"a header below {MAX_SAE_HEADER >> 20} MiB", f"{claimed >> 20} MiB")
    return file


def safetensors_header(path: Paths) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes in a safetensors file, without its data."""
    header = files.safetensors_header(_few_tensors(path))
    return {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}


def read_safetensors(path: Paths, *, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of a safetensors file; on CPU they are mapped and cost no memory until they are read."""
    file = _few_tensors(path)
    with _readable(file, "a safetensors file"), safe_open(str(file), framework="pt", device=device) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_rows(path: Paths, rows: list[int], row_axis: dict[str, int]) -> dict[str, Tensor]:
    """Only the given latents of every tensor; `row_axis` says which dimension counts latents, -1 for none.

    A contiguous run is one read, anything else one per latent, so a few features of a wide SAE stay cheap.
    """
    file = require_file(path, "a safetensors file")
    with _readable(file, "a safetensors file"), safe_open(str(file), framework="pt", device="cpu") as opened:
        return {name: _rows(opened, name, rows, row_axis.get(name, -1)) for name in opened.keys()}  # noqa: SIM118


def _rows(opened: Any, name: str, rows: list[int], axis: int) -> Tensor:
    if axis < 0:
        return opened.get_tensor(name)
    if axis == 0:
        part = opened.get_slice(name)
        return torch.cat([part[start:stop] for start, stop in _runs(rows)])
    # columns lie apart in the file: mapping the matrix and gathering reads only the pages that hold them
    return opened.get_tensor(name).index_select(axis, torch.tensor(rows))


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[start], rows[i - 1] + 1
            start = i


def write_safetensors(path: Paths, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        if metadata and len(metadata) > 1:
            _sort_notes(temporary)
    return Path(path)


def _sort_notes(path: Path) -> None:
    """Put the header's notes in order: the library writes them in a random one, and equal SAEs must be equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


# ---- pickles ----------------------------------------------------------------------------------------------


def _asked_for(message: str) -> str:
    """What torch's long refusal says that matters: the name that the pickle wanted, or why it could not go on."""
    for pattern in (r"GLOBAL ([\w.]+)", r"Unsupported (?:global|class)[: ]+([\w.]+)", r"(Unsupported operand \d+)"):
        if found := re.search(pattern, message):
            return f" ({printable(found[1].strip(), 100)})"
    return ""


def read_pickle(path: Paths) -> Any:
    """What `torch.save` wrote, restricted to tensors and plain data; a hostile pickle is refused, not run."""
    file = require_file(path, "a PyTorch file")
    with _readable(file, "a PyTorch file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # files from before PyTorch 1.6 are no archives and cannot be mapped
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise FormatError(
                file,
                "a PyTorch file of tensors and plain data",
                f"a pickle that asks for code to be run, or that is damaged{_asked_for(str(error))}",
                hint="hubsae never unpickles code. If you trust its author, save the state dict alone with torch.save",
            ) from error
    check_backing(file, loaded)
    return loaded


def owned(path: Path, tensors: dict[str, Tensor], sources: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """The tensors in memory of their own, where they are still views of a mapped PyTorch file.

    Training scripts save over their checkpoints in place, and a process that has such a file mapped dies of it.
    """
    if path.suffix not in PICKLES:
        return tensors
    mapped = {source.untyped_storage().data_ptr() for source in sources if source is not None}
    return {n: t.clone() if t.untyped_storage().data_ptr() in mapped else t for n, t in tensors.items()}


def check_backing(file: Path, value: Any) -> None:
    """Refuse tensors that claim more elements than the file has bytes for."""
    limit = file.stat().st_size
    total = 0
    seen: set[int] = set()
    for name, tensor in walk_tensors(value):
        if tensor.is_sparse or tensor.is_quantized or tensor.device.type == "meta":
            raise FormatError(file, f"plain tensors ({name})", f"a {tensor.layout} tensor on {tensor.device.type}")
        claimed = tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        if claimed > storage.nbytes() or storage.nbytes() > limit:
            raise FormatError(
                file,
                f"tensor {name} backed by bytes of the file ({limit})",
                f"shape {tuple(tensor.shape)}, {claimed} bytes",
                hint="the file is damaged or was made to exhaust memory",
            )
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    if total > limit:
        raise FormatError(file, f"at most {limit} bytes of tensors", f"{total} bytes")


def walk_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested dicts and lists, with its path."""
    if isinstance(value, Tensor):
        yield name or "tensor", value
    elif depth < 8 and isinstance(value, dict):
        for key, item in value.items():
            yield from walk_tensors(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif depth < 8 and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from walk_tensors(item, f"{name}[{i}]", depth + 1)


# ---- numpy ------------------------------------------------------------------------------------------------


def _npy_header(handle: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(handle)
    head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = head(handle)
    return shape, dtype


def npz_shapes(path: Paths) -> dict[str, tuple[int, ...]]:
    """Names and shapes in an npz archive, without its data."""
    file = require_file(path, "an npz archive")
    shapes = {}
    with _readable(file, "an npz archive"), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as member:
                shape, dtype = _npy_header(member)
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise FormatError(file, f"{info.filename} backed by its bytes ({info.file_size})", f"shape {shape}")
            if dtype.hasobject:
                raise FormatError(file, f"numbers in {info.filename}", "pickled objects, which are never read")
            shapes[info.filename.removesuffix(".npy")] = shape
    return shapes


def read_npz(path: Paths) -> dict[str, Tensor]:
    """Arrays of an npz archive; objects are refused, and archives that inflate without measure."""
    file = require_file(path, "an npz archive")
    npz_shapes(file)
    with _readable(file, "an npz archive"), zipfile.ZipFile(file) as archive:
        inflated = sum(info.file_size for info in archive.infolist())
        if inflated > MAX_INFLATION * file.stat().st_size:
            raise FormatError(file, f"at most {MAX_INFLATION}x its size when unpacked", f"{inflated} bytes")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


def read_raw(path: Paths, count: int | None = None) -> Tensor:
    """One tensor in a file of its own: .npy, safetensors, a torch file, or bare little-endian float32."""
    file = require_file(path, "a tensor file")
    with file.open("rb") as handle:
        head = handle.read(8)
    if head.startswith(b"\x93NUMPY"):
        with _readable(file, "a .npy file"), file.open("rb") as handle:
            shape, dtype = _npy_header(handle)
            if math.prod(shape) * dtype.itemsize > file.stat().st_size:
                raise ValueError(f"it claims {math.prod(shape) * dtype.itemsize} bytes, the file has fewer")
            return torch.from_numpy(np.ascontiguousarray(np.load(file, allow_pickle=False)))
    if head.startswith(b"PK") or head[:2] == b"\x80\x02":
        value = read_pickle(file)
        if not isinstance(value, Tensor):
            raise FormatError(file, "one tensor", type(value).__name__)
        return value
    if len(head) == 8 and head[:1] != b"{" and int.from_bytes(head, "little") < file.stat().st_size:
        try:
            tensors = read_safetensors(file)
            if len(tensors) == 1:
                return next(iter(tensors.values()))
        except FormatError:
            pass  # small floats can look like a header length; the size check below decides
    size = file.stat().st_size
    if size % 4 or (count is not None and size != 4 * count):
        expected = f"{4 * count} bytes of float32" if count is not None else "bytes of float32"
        raise FormatError(file, expected, f"{size} bytes")
    return torch.from_numpy(np.fromfile(file, dtype="<f4"))


# ---- checks -----------------------------------------------------------------------------------------------


def ensure_finite(path: Paths, tensors: dict[str, Tensor]) -> None:
    """Refuse NaN and infinity in weights.

    A sum reads each value once at memory speed (0.03 ms per MB) and is not finite if any value is not; only
    then, or when large values overflow it, each is looked at.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=_wide(tensor)))):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise FormatError(
                path,
                f"finite numbers in {name}",
                f"{bad} of {tensor.numel()} values NaN or infinite",
                hint="the training diverged or the file is damaged; publish an earlier checkpoint",
            )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
