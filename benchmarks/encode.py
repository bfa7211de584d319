"""Encoding speed (inference) against the installed peers: same weights, same data, interleaved rounds.

    python benchmarks/encode.py [--threads 1] [--rounds 7] [--quick]

Sparse output is indices and values of the active latents; dense output is the whole code matrix, which is what
SAELens and dictionary_learning return. The ratio is taken within a round; the median of the rounds is reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def encoders(d: int, n: int, k: int):
    """Name to a function of x; all with the same weights."""
    import torch

    from hubsae.core.config import SAEConfig
    from hubsae.hub.sae import HubSAE

    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=d, d_sae=n, k=k))
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(d) * 0.1)
    W, b_dec = sae.W_enc.detach(), sae.b_dec.detach()
    made = {"hubsae sparse": sae.encode_sparse, "hubsae dense": sae.encode}
    try:
        from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

        config = TopKSAEConfig(d_in=d, d_sae=n, k=k, apply_b_dec_to_input=True, rescale_acts_by_decoder_norm=False)
        lens = TopKSAE(config)
        with torch.no_grad():
            lens.W_enc.copy_(W), lens.W_dec.copy_(sae.W_dec), lens.b_dec.copy_(b_dec), lens.b_enc.zero_()
        made["saelens dense"] = lens.encode
    except ImportError as error:
        print(f"saelens is not installed: {error}")
    try:
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k), device="cpu", dtype=torch.float32)
        with torch.no_grad():
            coder.encoder.weight.copy_(W.t()), coder.encoder.bias.zero_(), coder.b_dec.copy_(b_dec)
        made["sparsify sparse"] = coder.encode
    except ImportError as error:
        print(f"sparsify is not installed: {error}")
    try:
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        ae = AutoEncoderTopK(d, n, k)
        with torch.no_grad():
            ae.encoder.weight.copy_(W.t()), ae.encoder.bias.zero_(), ae.b_dec.copy_(b_dec)
        made["dictionary_learning dense"] = ae.encode
    except ImportError as error:
        print(f"dictionary_learning is not installed: {error}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")) or None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    import torch
    from train import cpu_name

    if options.threads:
        torch.set_num_threads(options.threads)
    d, n, k, tokens = (16, 256, 4, 256) if options.quick else (896, 7168, 64, 2048)
    print(f"{cpu_name()}; torch {torch.__version__}, {torch.get_num_threads()} threads, d={d} n={n} k={k}")
    made = encoders(d, n, k)
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(0))
    wall = {name: [] for name in made}
    cpu = {name: [] for name in made}
    with torch.no_grad():
        for round_ in range(options.rounds + 1):
            for name, encode in made.items():
                w, c = time.perf_counter(), time.process_time()
                encode(x)
                if round_:
                    wall[name].append(time.perf_counter() - w)
                    cpu[name].append(time.process_time() - c)
    for name in made:
        print(f"  {name:26s} {tokens / statistics.median(wall[name]):10,.0f} tokens/s", end="")
        for ours in ("hubsae sparse", "hubsae dense"):
            by_wall = statistics.median(b / a for a, b in zip(wall[ours], wall[name], strict=True))
            by_cpu = statistics.median(b / a for a, b in zip(cpu[ours], cpu[name], strict=True))
            print(f"   {ours}: x{by_wall:.2f} wall, x{by_cpu:.2f} CPU", end="")
        print()


if __name__ == "__main__":
    main()
