"""One evaluation pass over 24 SAEs, against reading the activations once plus the encoders' matrix products.

    python benchmarks/evals.py [--quick] [--tokens 16384] [--saes 24] [--rounds 3] [--threads 1]

Both are done round by round on the same blocks and the ratio is taken within a round. CPU time is reported beside
wall time: on a shared machine only it, and ratios within a round, mean something. The promise is at most 1.3.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def cpu_model() -> str:
    """As /proc/cpuinfo names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


ENCODE, PRODUCTS = "encode: selection", "encode: products"
WHOLE, READ_OFF = "accumulate", "read off, with intervals"


class Clock:
    """CPU and wall seconds by name."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu[name] += time.process_time() - cpu
            self.wall[name] += time.perf_counter() - wall

    def wrap(self, name: str, function):
        def timed(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--saes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--d", type=int, default=896)
    parser.add_argument("--d-sae", type=int, default=7168)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="4 SAEs, 4,096 tokens, 1 round")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.saes, options.rounds = 4096, 4, 1

    import torch

    torch.set_num_threads(options.threads)
    from hubsae.activations import ActivationDataset, ActivationWriter
    from hubsae.core.config import SAEConfig
    from hubsae.evals import accumulate as parts
    from hubsae.evals import read_off, reconstruction
    from hubsae.evals.passes import BLOCK_ROWS
    from hubsae.hub.sae import HubSAE
    from hubsae.kernels import inference
    from hubsae.kernels.linear import rows_at_once

    config = SAEConfig(architecture="topk", d_in=options.d, d_sae=options.d_sae, k=options.k)
    saes = {f"sae{i}": HubSAE.random(config, seed=i) for i in range(options.saes)}
    rounds: list[tuple[float, float, float, float]] = []
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        x = torch.randn(options.tokens, options.d, generator=torch.Generator().manual_seed(0))
        row = torch.arange(options.tokens)
        with ActivationWriter(folder, d=options.d, config="layers.0") as writer:
            writer.write(x, position=row % 60, sample_id=row // 60, is_prompt=True)
        data = ActivationDataset.open(folder, "layers.0")
        # what the first call of a process costs (imports for the label columns, trials of products) is not the pass
        one = dict([*saes.items()][:1])
        reconstruction(one, data)

        def floor() -> None:
            """Read once, and only the products, in the pieces that encoding makes."""
            for batch in data.batches(BLOCK_ROWS, shuffle=False):
                wide = batch.float()  # pyright: ignore[reportAttributeAccessIssue]
                for sae in saes.values():
                    step = rows_at_once(len(wide), sae.d_sae)
                    for start in range(0, len(wide), step):
                        inference.encode_linear(wide[start : start + step], sae.W_enc, sae.b_enc)

        def whole() -> None:
            reconstruction(saes, data)

        for _ in range(options.rounds):
            times = []
            for work in (floor, whole):
                cpu, wall = time.process_time(), time.perf_counter()
                work()
                times += [time.process_time() - cpu, time.perf_counter() - wall]
            rounds.append((times[0], times[1], times[2], times[3]))

        # the breakdown is a round of its own, so that timing the parts does not slow the rounds that count
        timed = [
            (HubSAE, "encode_sparse", ENCODE),
            (inference, "encode_linear", PRODUCTS),
            (HubSAE, "decode", "decode"),
            (parts, "_add_errors", "errors and norms per row"),
            (parts, "_add_codes", "latent counts, sums, maxima"),
            (read_off, "read_off", READ_OFF),
        ]
        originals = [getattr(owner, name) for owner, name, _ in timed]
        for (owner, name, label), original in zip(timed, originals, strict=True):
            setattr(owner, name, clock.wrap(label, original))
        try:
            with clock(WHOLE):
                reconstruction(saes, data)
        finally:
            for (owner, name, _), original in zip(timed, originals, strict=True):
                setattr(owner, name, original)
        with clock("reading"):
            for _ in data.batches(BLOCK_ROWS, shuffle=False):
                pass

    print(f"{cpu_model()}, {options.threads} thread(s), torch {torch.__version__}")
    print(f"{options.saes} SAEs {options.d} x {options.d_sae}, k {options.k}, {options.tokens:,} tokens")
    for number, (floor_cpu, floor_wall, cpu, wall) in enumerate(rounds):
        print(
            f"round {number}: reading and products {floor_cpu:.2f} s CPU ({floor_wall:.2f} wall), "
            f"evaluation {cpu:.2f} s CPU ({wall:.2f} wall), "
            f"ratio {cpu / floor_cpu:.3f} CPU, {wall / floor_wall:.3f} wall"
        )
    print(
        f"median ratio: {statistics.median(r[2] / r[0] for r in rounds):.3f} CPU, "
        f"{statistics.median(r[3] / r[1] for r in rounds):.3f} wall (promised: at most 1.3)"
    )
    cpu = clock.cpu
    # what is timed inside something else, or is the sum of the rest, is taken apart
    cpu[ENCODE] -= cpu[PRODUCTS]
    total = cpu.pop(WHOLE)
    cpu["other"] = total + cpu["reading"] - sum(cpu.values())
    for name, seconds in sorted(cpu.items(), key=lambda item: -item[1]):
        print(f"  {name:36s} {seconds:8.3f} s CPU  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
