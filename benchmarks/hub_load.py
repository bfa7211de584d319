"""What a load over the Hub costs: requests, bytes and CPU time, beside SAELens and a bare download.

    python benchmarks/hub_load.py [--quick] [--no-saelens]

A local hub serves one release of 24 SAEs of 51 MB (d_in 896, d_sae 7168, k 64). First loads go to an empty cache;
cached loads repeat with everything there. Rounds are interleaved; CPU time is that of the loading thread alone, because
the hub runs in the same process. Every weight is read once, so that a mapped file does not look free.
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
HOME = tempfile.mkdtemp(prefix="hub-load-")
os.environ |= {"HF_HOME": HOME, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

D_IN, D_SAE, K, LAYERS = 896, 7168, 64, 24


def cpu_name() -> str:
    """Model of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--no-saelens", action="store_true", help="leave SAELens out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    from hubsae import localhub

    with localhub.running(tokens={"me": "hf_me"}) as hub:
        os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"] = hub.url, "hf_me"
        measure(hub, 5 if args.quick else 15, with_saelens=not args.no_saelens)


def measure(hub: Any, repeats: int, *, with_saelens: bool) -> None:
    """Publish, then load in turns."""
    import torch
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    from hubsae import HubSAE, SAEConfig, push
    from hubsae.formats import Release

    torch.set_num_threads(1)
    folder = Path(HOME) / "release"
    release = Release.create(folder, name="bench", base_model="a/b")
    config = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K)
    for layer in range(LAYERS):
        release.add(HubSAE.random(config, seed=layer), f"saes/layer{layer}")
    started = time.perf_counter()
    push(release.path, "me/bench", check_saelens=False)
    pushed = time.perf_counter() - started
    print(f"{cpu_name()}, one thread; {LAYERS} SAEs of {D_IN} x {D_SAE} published in {pushed:.1f} s (checks included)")

    def read(tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.detach().sum()

    def ours(n: int, cache: str) -> None:
        read(list(HubSAE.from_pretrained("me/bench", f"saes/layer{n}", cache_dir=cache).parameters()))

    def bare(n: int, cache: str) -> None:
        path = f"saes/layer{n}/sae_weights.safetensors"
        read(list(load_file(hf_hub_download("me/bench", path, cache_dir=cache)).values()))

    loaders: dict[str, Callable[[int, str], None]] = {"hubsae": ours, "bare download + safetensors": bare}
    if with_saelens:
        from huggingface_hub import constants
        from sae_lens import SAE

        def lens(n: int, cache: str) -> None:
            constants.HF_HUB_CACHE = cache  # SAELens takes no cache_dir
            read(list(SAE.from_pretrained("me/bench", f"saes/layer{n}").parameters()))

        loaders["SAELens"] = lens

    weights = (folder / "saes/layer0/sae_weights.safetensors").stat().st_size
    print("\nfirst load of one SAE, empty cache")
    for name, load in loaders.items():
        cache = tempfile.mkdtemp(dir=HOME)
        before = len(hub.requests)
        load(0, cache)
        files = [p for p in Path(cache).rglob("*") if p.is_file() and not p.is_symlink()]
        extra = sum(p.stat().st_size for p in files) - weights
        print(f"  {name:30} {len(hub.requests) - before:3} requests, weights + {extra / 1000:.1f} kB")

    print("\nload from cache")
    caches = {name: tempfile.mkdtemp(dir=HOME) for name in loaders}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    requests: dict[str, int] = {}
    for name, load in loaders.items():
        load(1, caches[name])
    for _ in range(repeats):
        for name, load in loaders.items():
            before, start = len(hub.requests), time.thread_time()
            load(1, caches[name])
            times[name].append(time.thread_time() - start)
            requests[name] = len(hub.requests) - before
    reference = "bare download + safetensors"
    for name in loaders:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))
        milliseconds = statistics.median(times[name]) * 1000
        print(f"  {name:30} {requests[name]:3} requests, {milliseconds:6.1f} ms CPU, {ratio:.2f} of the bare load")


if __name__ == "__main__":
    main()
