"""What the sums of a probe cost beside the encoding pass they ride on, at 32,768 latents: CPU seconds, interleaved.

python benchmarks/probes.py [--d 576] [--latents 32768] [--k 32] [--firing 6000] [--rows 8192] [--runs 3]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from hubsae.core.config import SAEConfig
from hubsae.core.sae import SAE
from hubsae.evals.passes import run_pass
from hubsae.evals.ridge import RidgeSums


class Nothing:
    """An accumulator that takes nothing: the encoding pass alone."""

    columns = ()

    def add(self, block) -> None: ...

    def result(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("d", 576), ("latents", 32_768), ("k", 32), ("firing", 6000), ("rows", 8192), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    sae = SAE.random(SAEConfig(architecture="topk", d_in=args.d, d_sae=args.latents, k=args.k))
    with torch.no_grad():
        sae.b_enc[args.firing :] = -1e3
    x = torch.randn(args.rows, args.d)
    columns = {"score": torch.randn(args.rows), "problem": torch.arange(args.rows) // 8}
    found: dict[str, list[float]] = {"encoding": [], "with sums": []}
    for run in range(args.runs + 1):
        for name in found:
            sums: Any = Nothing() if name == "encoding" else RidgeSums(["score"], sae="a", group="problem", folds=2)
            began = time.process_time()
            run_pass(x, {"a": sae}, [sums], columns=columns)
            if run:
                found[name].append(time.process_time() - began)
    alone, beside = (min(times) for times in found.values())
    print(f"{len(sums.latents):,} of {args.latents:,} latents fired, {args.rows:,} rows of {args.d}, k {args.k}")
    print(f"encoding {alone:.2f} s, with the sums of a probe {beside:.2f} s: {beside / alone:.2f} times")


if __name__ == "__main__":
    main()
