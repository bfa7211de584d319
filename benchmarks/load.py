"""How long it takes to open one 51 MB SAE of a release, beside a bare safetensors load and SAELens.

    python benchmarks/load.py [--quick]

Since safetensors 0.8 a bare load maps the file and reads nothing, so it takes the same 0.1 ms for any size and
the cost appears later, when the weights are first used. Opening is therefore measured to the point where every
weight has been read once: hubsae reads them itself (the check for NaN), the bare load and SAELens are followed by
a sum over each tensor. The mapped-only times stand beside it. CPU time of one thread (a wall clock would
measure the machine's other work), interleaved in one process, medians of ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

from hubsae import HubSAE, SAEConfig
from hubsae.formats import Release

D_IN, D_SAE, K = 896, 7168, 64


def cpu_name() -> str:
    """Model of the CPU, since every ratio depends on it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def read_all(tensors: Any) -> float:
    """Read every weight once."""
    return float(sum(t.detach().sum() for t in tensors))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--no-saelens", action="store_true", help="leave SAELens out (its import takes seconds)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        release = Release.create(Path(folder) / "release", name="bench", base_model="Qwen/Qwen2.5-0.5B-Instruct")
        config = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K)
        for layer in (6, 12, 18):
            release.add(HubSAE.random(config, seed=layer), f"saes/layer{layer}")
        root, id = release.path, "saes/layer12"
        weights = str(root / id / "sae_weights.safetensors")
        x = torch.randn(64, D_IN)

        def bare_forward() -> torch.Tensor:
            t = load_file(weights)
            pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
            top = torch.topk(pre, K, dim=-1)
            return torch.nn.functional.embedding_bag(
                top.indices, t["W_dec"], per_sample_weights=top.values.relu(), mode="sum"
            )

        ways: dict[str, Callable[[], Any]] = {
            "safetensors load_file, every weight read once": lambda: read_all(load_file(weights).values()),
            "hubsae Release.open + load (checks every weight)": lambda: Release.open(root).load(id),
            "hubsae HubSAE.from_pretrained(folder, id)": lambda: HubSAE.from_pretrained(root, id),
            "safetensors load_file, mapped only": lambda: load_file(weights),
            "safetensors load_file + encode and decode 64 tokens": bare_forward,
            "hubsae Release.open + load + encode and decode 64 tokens": lambda: Release.open(root).load(id)(x),
        }
        if not args.no_saelens:
            try:
                from sae_lens import SAE

                ways["SAELens load_from_disk, every weight read once"] = lambda: read_all(
                    SAE.load_from_disk(str(root / id)).parameters()
                )
            except ImportError:
                print("sae-lens is not installed: left out")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range((7 if args.quick else 41) + 2):
            for name, way in ways.items():
                start = time.process_time()
                value = way()
                took = time.process_time() - start
                del value
                if round_ >= 2:  # the first rounds warm the page cache and the imports
                    seconds[name].append(took)
    size = os.path.getsize(weights) if os.path.exists(weights) else 4 * (2 * D_IN * D_SAE + D_SAE + D_IN)
    print(f"{cpu_name()}, 1 thread, torch {torch.__version__}, one SAE of {size / 1e6:.1f} MB, warm page cache\n")
    base = {
        name: "safetensors load_file + encode and decode 64 tokens" if "64 tokens" in name else next(iter(ways))
        for name in ways
    }
    print(f"{'':58}{'CPU ms':>12}{'x bare':>9}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[base[name]], strict=True))
        print(f"{name:58}{statistics.median(times) * 1e3:12.2f}{ratio:9.2f}")


if __name__ == "__main__":
    main()
