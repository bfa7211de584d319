"""Twelve cells of a sweep trained together against one after another, with the same trainer on the same data.

    python benchmarks/train_many.py            the tiny world's shapes and those of the published sweep at a quarter
    python benchmarks/train_many.py --quick    the tiny shapes, fewer steps

One run is `train_many` of twelve cells (TopK, BatchTopK and trained JumpReLU, two widths, two sparsities), the other
`train` of each of them in turn; both read the same file of activations in the same order and have the same cores (all
of them, unless --threads says otherwise): together, each core steps its share of the cells; in turn, every operator is
split over the cores. They take turns, and what is compared is the wall time and the CPU time of this process, each as
the median of the ratios of neighbouring runs. The weights of both are compared too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hubsae.activations import ActivationDataset, ActivationWriter
from hubsae.recipes.registry import find_recipe
from hubsae.train import TrainConfig, TrainResult, train, train_many

RECIPE = find_recipe("grid_search")
configs, settings = (RECIPE.module("configs"), RECIPE.module("settings"))
train_configs = configs.train_configs
SweepSettings, TrainSettings = settings.SweepSettings, settings.TrainSettings


class Shape(NamedTuple):
    """What is trained."""

    name: str
    d: int
    tokens: int
    batch: int
    expansions: tuple[float, ...]
    ks: tuple[int, ...]
    epochs: float


SHAPES = (
    Shape("d 64: twelve cells of the tiny profile", 64, 40_000, 512, (4, 8), (4, 8), 3),
    Shape("d 224, a quarter of the published width", 224, 12_000, 512, (4, 8), (32, 64), 1),
    Shape("d 896 as published, 4x and 8x", 896, 4_096, 512, (4, 8), (32, 64), 1),
)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the tiny shapes, three rounds")
    parser.add_argument("--rounds", type=int, default=7, help="how often both take their turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{cpu()}, {arguments.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'':40} {'wall s: together':>17} {'in turn':>8} {'ratio':>6} {'(range)':>14} {'CPU ratio':>10} {'weights':>9}"
    )
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        report(shape, 3 if arguments.quick else arguments.rounds)


def report(shape: Shape, rounds: int) -> None:
    """Measure one shape and print its line."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_activations(shape, Path(folder))
        sweep = SweepSettings(
            kinds=("topk", "batch_topk", "jumprelu_trained"), expansions=shape.expansions, ks=shape.ks
        )
        settings = TrainSettings(epochs=shape.epochs, batch_size=shape.batch, lr=1e-3)
        configs = train_configs(sweep.cells(), settings, data)
        assert len(configs) == 12
        together(configs, data)  # trials of matmul backends and first touches of memory are paid by neither
        in_turn(configs, data)
        cpus, walls, times, difference = [], [], [], 0.0
        for number in range(rounds):
            order = (together, in_turn) if number % 2 == 0 else (in_turn, together)
            measured = {way.__name__: timed(way, configs, data) for way in order}
            a, b = measured["together"], measured["in_turn"]
            cpus.append(a[0] / b[0])
            walls.append(a[1] / b[1])
            times.append((a[1], b[1]))
            difference = max(difference, largest_difference(a[2], b[2]))
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{shape.name:40} {mine:17.2f} {theirs:8.2f} {statistics.median(walls):6.2f} "
            f"{f'({min(walls):.2f} to {max(walls):.2f})':>14} {statistics.median(cpus):10.2f} {difference:9.1e}"
        )


def write_activations(shape: Shape, folder: Path) -> ActivationDataset:
    """Sparse sums of random directions, in the published format."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * shape.d, shape.d, generator=generator), dim=1)
    with ActivationWriter(folder, d=shape.d, config="layers.0") as writer:
        for start in range(0, shape.tokens, 1024):
            rows = min(1024, shape.tokens - start)
            on = torch.rand(rows, 4 * shape.d, generator=generator) < 8 / (4 * shape.d)
            x = (on * torch.rand(on.shape, generator=generator)) @ directions
            writer.write(x, sample_id=start // 1024)
    return ActivationDataset.open(folder, "layers.0")


def together(configs: list[TrainConfig], data: ActivationDataset) -> list[TrainResult]:
    """One pass for all."""
    return train_many(configs, data, quiet=True)


def in_turn(configs: list[TrainConfig], data: ActivationDataset) -> list[TrainResult]:
    """One pass for each."""
    return [train(config, data, quiet=True) for config in configs]


def timed(
    way: Callable[..., list[TrainResult]], configs: list[TrainConfig], data: ActivationDataset
) -> tuple[float, float, list[TrainResult]]:
    """CPU seconds, wall seconds, and what came out."""
    cpu_start, start = time.process_time(), time.perf_counter()
    results = way(configs, data)
    return time.process_time() - cpu_start, time.perf_counter() - start, results


def largest_difference(a: list[TrainResult], b: list[TrainResult]) -> float:
    """The largest difference between weights of the same cell, as a share of the largest weight."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.sae is not None and y.sae is not None
        for name, tensor in x.sae.tensors().items():
            other = y.sae.tensors()[name]
            worst = max(worst, float((tensor - other).abs().max() / other.abs().max().clamp_min(1e-12)))
    return worst


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
