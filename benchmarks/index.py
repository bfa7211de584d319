"""The feature table against a full sort: millions of (token, feature) records per CPU second, and memory.

    python benchmarks/index.py [--records 48] [--features 65536] [--k 64] [--top 5] [--random 5] [--window 8] [--quick]

Codes are made beforehand and handed over block by block, so that only the table is timed. Values are rounded to
float16, so that ties occur. The first blocks are checked against a sort of all their records, bit for bit. What is
promised: 40 M records per CPU second, 80 M in the second half of a run, at most 150 MB beside the codes.

    python benchmarks/index.py --passes

A whole pass instead: reading and encoding 16,384 activations of width 576 by a TopK SAE of 4,608 features, with the
table and without it, by turns; at most 1.25 times is promised.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np


def make_codes(k: int, rows: int, seed: int, active: np.ndarray, share: np.ndarray):
    """Codes [rows, k] with features of very different frequency."""
    g = np.random.default_rng(seed)
    indices = np.sort(active[np.searchsorted(share, g.random((rows, k)))].astype(np.int32), 1)
    while (twice := np.diff(indices, axis=1, prepend=-1) == 0).any():  # a feature fires once on a token
        indices[twice] = active[np.searchsorted(share, g.random(int(twice.sum())))]
        indices.sort(1)
    values = np.abs(g.standard_normal((rows, k)) * 3).astype(np.float16).astype(np.float32) + np.float32(2**-6)
    return indices, values


def measure_passes() -> None:
    """CPU seconds of a pass with the table and of one without, from activations on disk."""
    import tempfile

    import torch

    from hubsae.activations import ActivationDataset, ActivationWriter
    from hubsae.core.config import SAEConfig
    from hubsae.core.sae import SAE
    from hubsae.evals.passes import run_pass
    from hubsae.index.table import FeatureTable

    sae = SAE.random(SAEConfig(architecture="topk", d_in=576, d_sae=4608, k=32))
    row = torch.arange(16_384)
    with tempfile.TemporaryDirectory() as folder:
        with ActivationWriter(folder, d=576, config="layers.15") as writer:
            x = torch.randn(len(row), 576, generator=torch.Generator().manual_seed(0))
            writer.write(x, position=row % 286, sample_id=row // 286, token_id=row % 50_000)
        data = ActivationDataset.open(folder, "layers.15")
        seconds: list[list[float]] = [[], []]
        for turn in range(8):
            tables = [FeatureTable("a", 4608)] if turn % 2 else []
            start = time.process_time()
            run_pass(data, {"a": sae}, tables)
            seconds[turn % 2].append(time.process_time() - start)
    bare, whole = (sorted(part)[len(part) // 2] for part in seconds)
    print(f"reading and encoding {bare:.2f} CPU s, with the table {whole:.2f}: {whole / bare:.3f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=float, default=48, help="millions")
    parser.add_argument("--features", type=int, default=65_536)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="6 M records of 8,192 features")
    parser.add_argument("--passes", action="store_true", help="time whole passes with the table and without")
    options = parser.parse_args()
    if options.passes:
        return measure_passes()
    if options.quick:
        options.records, options.features = 6, 8192

    import torch

    torch.set_num_threads(1)
    from hubsae.index.table import FeatureTable

    block = 4096
    g = np.random.default_rng(0)
    active = g.permutation(options.features)[: int(options.features * 0.45)]
    share = np.cumsum(1 / np.arange(1, len(active) + 1) ** 0.7)
    share /= share[-1]
    held = [make_codes(options.k, block, n, active, share) for n in range(4)]
    blocks = max(2, round(options.records * 1e6 / (block * options.k)))
    table = FeatureTable("a", options.features, top=options.top, random=options.random, window=options.window)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for n in range(blocks):
        indices, values = held[n] if n < len(held) else make_codes(options.k, block, n, active, share)
        row = np.arange(n * block, (n + 1) * block)
        labels = {"sample_id": row // 286, "position": row % 286, "token_id": row % 50_000}
        start = time.process_time()
        table.add_codes(indices, values, labels, n * block)
        times.append(time.process_time() - start)

    def most() -> float:
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3

    running = most()
    start = time.process_time()
    table.result()
    end = time.process_time() - start
    rate = block * options.k / 1e6
    half = blocks // 2
    print(f"{options.features:,} features, k {options.k}, top {options.top}, random {options.random}, "
          f"window {options.window}: {blocks * rate:.0f} M records")  # fmt: skip
    print(f"all of it      {blocks * rate / (sum(times) + end):7.1f} M records per CPU second")
    print(f"second half    {(blocks - half) * rate / (sum(times[half:]) + end):7.1f} M records per CPU second")
    print(f"memory         {running:7.1f} MB at most beside the codes, {most():.1f} with the last cut")
    print(f"records kept   {len(table.records.feature):,} of {len(active):,} active features")

    check = FeatureTable("a", options.features, top=options.top, random=0, window=0)
    for n in range(4):
        check.add_codes(*held[n], {"sample_id": np.arange(n * block, (n + 1) * block)}, n * block)
    kept = check.result().records
    feature, value = (np.concatenate([held[n][part].reshape(-1) for n in range(4)]) for part in (0, 1))
    index = np.repeat(np.arange(4 * block), options.k)
    order = np.lexsort((index, -value, feature))
    starts = np.searchsorted(feature[order], np.arange(options.features))
    best = order[np.arange(len(order)) - starts[feature[order]] < options.top]
    same = all(
        np.array_equal(mine, theirs[best])
        for mine, theirs in ((kept.feature, feature), (kept.value, value), (kept.index, index))
    ) and np.array_equal(check.count, np.bincount(feature, minlength=options.features))
    print(f"equal to a full sort of the first {4 * rate:.1f} M records: {'yes, bit for bit' if same else 'NO'}")


if __name__ == "__main__":
    main()
