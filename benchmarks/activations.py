"""Activation datasets against what people use: reading, shuffled reading, writing, harvesting.

    python benchmarks/activations.py [--quick] [--only read,shuffle,write,harvest]

All contenders of a section run in turn within each round; the ratio of each round is taken, and the median of the
ratios is printed. Reading and writing are measured in CPU time per token on one thread, because the wall clock of a
shared machine says little; the page cache is warm.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

torch.set_num_threads(1)
BATCH = 8192


def rounds(contenders: dict[str, Callable[[], int]], count: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU us, wall us) per token of each contender in each round; a contender returns how many tokens it did."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, run in contenders.items():
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[name].append((cpu / tokens * 1e6, wall / tokens * 1e6))
    return found


def table(title: str, found: dict[str, list[tuple[float, float]]], reference: str, *, faster: str) -> None:
    """Print medians and the median ratio to the reference."""
    print(f"\n{title}\n{'':38}{'cpu us/tok':>12}{'wall us/tok':>12}{'M tok/cpu-s':>13}  {faster}")
    for name, values in found.items():
        cpu, wall = (statistics.median(v[i] for v in values) for i in (0, 1))
        ratio = statistics.median(r[0] / v[0] for r, v in zip(found[reference], values, strict=True))
        print(f"{name:38}{cpu:12.3f}{wall:12.3f}{1 / cpu:13.3f}  {ratio:.2f}")


def vectors(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    """Vectors like a residual stream: a scale per dimension, and a few massive ones."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(d, generator=generator).exp()
    x = torch.randn(rows, d, generator=generator) * scale
    x[::200, :3] *= 100
    return x.half()


def make(folder: Path, rows: int, d: int) -> Path:
    """A dataset of ours."""
    from hubsae.activations import ActivationWriter

    x = vectors(BATCH, d)
    with ActivationWriter(folder, d=d, config="layers.6", dtype="float16") as writer:
        for start in range(0, rows, BATCH):
            n = min(BATCH, rows - start)
            number = np.arange(start, start + n)
            writer.write(x[:n].roll(start // BATCH, 1), number % 1000, number % 200, number // 200, number % 200 < 50)
    return folder


def bench_read(work: Path, d: int, megabytes: int, count: int) -> None:
    """Sequential batches of 8192."""
    import datasets
    import pyarrow.parquet as pq

    from hubsae.activations import ActivationDataset

    rows = megabytes * 1_000_000 // (2 * d)
    folder = make(work / f"d{d}", rows, d)
    data = ActivationDataset.open(folder)
    raw = work / f"raw{d}.bin"
    with open(raw, "wb") as file:
        for batch in data.batches(BATCH, shuffle=False):
            file.write(batch.numpy().tobytes())
    path = data.sources[0].name
    table_ = pq.read_table(path, columns=["vector"])["vector"].combine_chunks().flatten().to_numpy()
    assert table_.tobytes() == data.read_all().numpy().tobytes(), "not bit-equal to pyarrow"
    del table_

    def raw_readinto(buffers: int) -> int:
        held = [np.empty(BATCH * d * 2 + 4096, np.uint8) for _ in range(buffers)]
        views = [memoryview(b)[-b.ctypes.data % 4096 :][: BATCH * d * 2] for b in held]
        turn = 0
        with open(raw, "rb", buffering=0) as file:
            while file.readinto(views[turn % buffers]):
                turn += 1
        return rows

    def ours() -> int:
        return sum(len(b) for b in data.batches(BATCH, shuffle=False))

    def ours_let_go() -> int:
        total = 0
        for batch in data.batches(BATCH, shuffle=False):
            total += len(batch)
            del batch
        return total

    def through_pyarrow() -> int:
        total = 0
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=["vector"]):
            values = torch.from_numpy(batch.column(0).flatten().to_numpy().copy())
            total += len(values) // d
        return total

    stream = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    stream = stream.select_columns(["vector"])

    def datasets_streaming(kind: str) -> Callable[[], int]:
        def run() -> int:
            total = 0
            for batch in stream.with_format(kind).iter(BATCH):
                total += len(batch["vector"])
            return total

        return run

    contenders = {
        "raw readinto, one buffer": lambda: raw_readinto(1),
        "raw readinto, two buffers in turn": lambda: raw_readinto(2),
        "hubsae": ours,
        "hubsae, batch dropped before the next": ours_let_go,
    }
    found = rounds(contenders, count)
    slow = {
        "pyarrow iter_batches": through_pyarrow,
        "datasets streaming, arrow": datasets_streaming("arrow"),
        "datasets streaming, torch": datasets_streaming("torch"),
    }
    cached = saelens_layout(work, d, min(rows, 50_000))
    slow["SAELens layout, datasets torch batches"] = lambda: read_saelens(cached, d)
    found |= rounds(slow, max(1, count // 3))
    for name in slow:  # measured in fewer rounds: the median of the raw rounds stands beside them
        found[name] += [found[name][-1]] * (count - len(found[name]))
    table(f"read, d {d} float16, {megabytes} MB", found, "raw readinto, one buffer", faster="share of raw")


def saelens_layout(work: Path, d: int, rows: int) -> Path:
    """Cached activations as SAELens' CacheActivationsRunner keeps them: Array2D of contexts."""
    import datasets

    context = 128
    x = vectors(rows // context * context, d).float().view(-1, context, d).numpy()
    features = datasets.Features({"blocks.6.hook_resid_post": datasets.Array2D((context, d), "float32")})
    path = work / f"saelens{d}"
    if not path.exists():
        datasets.Dataset.from_dict({"blocks.6.hook_resid_post": list(x)}, features=features).save_to_disk(path)
    return path


def read_saelens(path: Path, d: int) -> int:
    """Read it back the way its store does."""
    import datasets

    total = 0
    rows = datasets.load_from_disk(str(path)).with_format("torch")
    for batch in rows.iter(BATCH // 128):
        total += batch["blocks.6.hook_resid_post"].reshape(-1, d).shape[0]
    return total


def bench_shuffle(work: Path, d: int, megabytes: int, count: int) -> None:
    """Shuffled batches of 8192."""
    import datasets

    from hubsae.activations import ActivationDataset

    rows = megabytes * 1_000_000 // (2 * d)
    folder = work / f"d{d}"
    if not folder.exists():
        make(folder, rows, d)
    data = ActivationDataset.open(folder)
    plain = datasets.load_dataset(
        "parquet", data_files=data.sources[0].name, split="train", cache_dir=str(work / "cache")
    )
    plain = plain.select_columns(["vector"]).with_format("torch")
    generator = np.random.default_rng(0)

    def windows(megabytes: int) -> Callable[[], int]:
        data = ActivationDataset.open(folder)  # its own, so that its memory stays its own
        return lambda: sum(len(b) for b in data.batches(BATCH, window_bytes=megabytes << 20))

    def map_style() -> int:
        chosen = generator.integers(0, len(plain), BATCH)
        return len(plain[chosen]["vector"])

    contenders = {"hubsae, windows of 256 MiB": windows(256), "hubsae, windows of 64 MiB": windows(64)}
    found = rounds(contenders, count)
    found |= rounds({"datasets map-style, random rows": map_style}, count)
    table(f"shuffled, d {d} float16", found, "datasets map-style, random rows", faster="times datasets")


def bench_write(work: Path, d: int, rows: int, count: int) -> None:
    """One core, float16."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hubsae.activations import ActivationWriter

    x = vectors(BATCH, d)
    number = np.arange(BATCH)

    def ours() -> int:
        shutil.rmtree(work / "w", ignore_errors=True)
        writer = ActivationWriter(work / "w", d=d, config="layers.6", finalize=False)
        for turn in range(rows // BATCH):
            writer.write(x, number, number % 200, number // 200 + turn * 100, number % 200 < 50)
        writer.close()
        return rows // BATCH * BATCH

    kind = pa.list_(pa.float16(), d)

    def pyarrow_plain() -> int:
        schema = pa.schema([pa.field("vector", kind), pa.field("token_id", pa.int32())])
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(
            work / "p.parquet", schema, data_page_version="2.0", data_page_size=8 << 20, **options
        ) as w:
            for _ in range(rows // BATCH):
                array = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), type=kind)
                w.write_table(pa.table([array, pa.array(number, pa.int32())], schema=schema))
        return rows // BATCH * BATCH

    def datasets_parquet() -> int:
        array = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), type=kind)
        datasets.Dataset(pa.table({"vector": array})).to_parquet(work / "d.parquet")
        return BATCH

    found = rounds({"hubsae, with statistics": ours, "pyarrow, plain": pyarrow_plain}, count)
    found |= rounds({"datasets to_parquet": datasets_parquet}, count)
    table(f"write, d {d} float16", found, "datasets to_parquet", faster="times datasets")


def mixed_lengths(samples: int, seed: int = 0) -> list[list[int]]:
    """Log-normal lengths, median 200 tokens."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(np.exp(generator.normal(np.log(200), 0.6, samples)).astype(int), 8, 1000)
    return [generator.integers(0, 1000, n).tolist() for n in lengths]


def bench_harvest(work: Path, size: str, samples: int, count: int) -> None:
    """Against the loop people write: CausalLM(output_hidden_states=True) in order of arrival."""
    import transformers

    from hubsae.activations import harvest
    from hubsae.activations.capture import padded

    shapes = {"tiny 8 M": (256, 6, 704, 8192), "small 50 M": (512, 8, 1408, 32000)}
    hidden, layers, middle, vocab = shapes[size]
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    hooks = [layers // 4, layers // 2, 3 * layers // 4]
    data = mixed_lengths(samples)
    tokens = sum(map(len, data))

    @torch.inference_mode()
    def naive() -> int:
        for start in range(0, len(data), 16):
            ids, mask = padded(data[start : start + 16])
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            for hook in hooks:
                states[hook + 1][mask].half()
        return tokens

    def ours() -> int:
        shutil.rmtree(work / "h", ignore_errors=True)
        harvest(model, data, hooks, out=work / "h", progress=False)
        return tokens

    found = rounds({"naive loop, nothing written": naive, "hubsae harvest, written to disk": ours}, count)
    table(
        f"harvest, {size}, {samples} samples, {tokens} tokens",
        found,
        "naive loop, nothing written",
        faster="times naive",
    )


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="read,shuffle,write,harvest")
    asked = parser.parse_args()
    quick, only = asked.quick, asked.only.split(",")
    count = 3 if quick else 9
    print(f"{processor()}, torch {torch.__version__}, 1 thread, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        megabytes = 200 if quick else 500
        if "read" in only:
            for d in (896, 4096):
                bench_read(work, d, megabytes, count)
        if "shuffle" in only:
            for d in (896, 4096):
                bench_shuffle(work, d, megabytes, count)
        if "write" in only:
            for d in (896, 4096):
                bench_write(work, d, 40_960 if quick else 163_840, max(2, count // 2))
        if "harvest" in only:
            bench_harvest(work, "tiny 8 M", 128 if quick else 256, 3)
            bench_harvest(work, "small 50 M", 48 if quick else 128, 3)


if __name__ == "__main__":
    main()
