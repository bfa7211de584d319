"""The feature table beside delphi's latent cache and SAEDashboard's feature data, interleaved on one stream of codes.

    python -m venv peers && peers/bin/pip install -c constraints.txt torch==2.13.0 .
    peers/bin/pip install jaxtyping simple-parsing sae-lens eindex-callum dataclasses-json
    peers/bin/pip install --no-deps eai-delphi==0.1.3 sae-dashboard==0.8.0
    peers/bin/python benchmarks/index_peers.py [--features 16384] [--k 32] [--rounds 12] [--shown 16]

Codes are made beforehand. Each round gives the same 8,192 tokens to all: to our table (10 strongest tokens and prompts,
10 drawn, contexts of 8 tokens on both sides), and to delphi's `InMemoryCache.add` as the dense tensor that it takes.
SAEDashboard works through all tokens feature by feature: it is given dense activations of `--shown` features, without
the encoding of the whole corpus that it repeats for every 256 of them, and makes of each its statistics, its histogram
and its sequences. CPU seconds, one thread; delphi's `save` (concatenation) and our last cut count. Of both only the
modules named are imported: their packages want GPU servers and versions that exclude each other.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections import defaultdict

import numpy as np
import torch
from index import make_codes

SEQUENCE = 128
ROWS = 8192


def import_cache():
    """delphi's cache, without what the `__init__` of its package imports."""
    spec = importlib.util.find_spec("delphi")
    bare = types.ModuleType("delphi.latents")
    bare.__path__ = [f"{place}/latents" for place in spec.submodule_search_locations]
    sys.modules["delphi.latents"] = bare
    from delphi.latents.cache import InMemoryCache

    return InMemoryCache


class Dashboard:
    """What SAEDashboard's runner computes of a feature, once it has the feature's activations."""

    def __init__(self, tokens: torch.Tensor):
        from sae_dashboard.components import ActsHistogramData
        from sae_dashboard.sae_vis_data import SaeVisConfig
        from sae_dashboard.sequence_data_generator import SequenceDataGenerator
        from sae_dashboard.utils_fns import FeatureStatistics

        self.statistics, self.histogram = FeatureStatistics.create, ActsHistogramData.from_data
        unembedding = torch.zeros(1, int(tokens.max()) + 1)
        self.logits = torch.randn(unembedding.shape[1])
        self.sequences = SequenceDataGenerator(SaeVisConfig("hook", []), tokens, unembedding)

    def show(self, acts: torch.Tensor) -> None:
        """Dense activations [sequences, tokens, features]."""
        self.statistics(data=acts.reshape(-1, acts.shape[2]).t().contiguous(), batch_size=64)
        for one in acts.unbind(2):
            self.histogram(data=one[one > 0], n_bins=50, tickmode="5 ticks", title="")
            nothing = torch.tensor([])
            self.sequences.get_sequences_data(
                feat_acts=one, feat_logits=self.logits, resid_post=nothing, feature_resid_dir=nothing
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shown", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from hubsae.index.table import FeatureTable

    g = np.random.default_rng(0)
    active = g.permutation(options.features)[: int(options.features * 0.45)]
    share = np.cumsum(1 / np.arange(1, len(active) + 1) ** 0.7)
    share /= share[-1]
    rounds = [make_codes(options.k, ROWS, n, active, share) for n in range(options.rounds)]
    indices, values = (np.concatenate([codes[part] for codes in rounds]) for part in (0, 1))
    tokens = torch.from_numpy(g.integers(0, 50_000, (options.rounds * ROWS // SEQUENCE, SEQUENCE)))
    often = np.argsort(-np.bincount(indices.reshape(-1), minlength=options.features))
    shown = often[np.linspace(0, len(active) // 2, options.shown * options.rounds, dtype=int)].reshape(
        options.rounds, -1
    )

    table = FeatureTable("a", options.features)
    cache = import_cache()(batch_size=ROWS // SEQUENCE)
    dashboard = Dashboard(tokens)
    seconds = defaultdict(float)

    def timed(name: str, call) -> None:
        start = time.process_time()
        call()
        seconds[name] += time.process_time() - start

    dashboard_records = 0
    for n, (index, value) in enumerate(rounds):
        dense = torch.zeros(ROWS, options.features)
        dense.scatter_(1, torch.from_numpy(index).long(), torch.from_numpy(value))
        dense = dense.view(-1, SEQUENCE, options.features)
        here = tokens[n * len(dense) : (n + 1) * len(dense)]
        row = np.arange(n * ROWS, (n + 1) * ROWS)
        labels = {"sample_id": row // SEQUENCE, "position": row % SEQUENCE, "token_id": here.reshape(-1).numpy()}
        timed("ours", lambda: table.add_codes(index, value, labels, n * ROWS))  # noqa: B023
        timed("delphi", lambda: cache.add(dense, here, n, "layer"))  # noqa: B023
        wanted = np.full(options.features, -1)
        wanted[shown[n]] = np.arange(options.shown)
        hit = np.nonzero(wanted[indices] >= 0)
        some = torch.zeros(len(indices), options.shown)
        some[torch.from_numpy(hit[0]), torch.from_numpy(wanted[indices[hit]])] = torch.from_numpy(values[hit])
        dashboard_records += len(hit[0])
        timed("SAEDashboard", lambda: dashboard.show(some.view(-1, SEQUENCE, options.shown)))  # noqa: B023
    timed("ours", table.result)
    timed("delphi", cache.save)
    assert len(cache.latent_activations["layer"]) == int(table.count.sum()), "they count the same firings"

    records = indices.size
    print(f"{options.features:,} features, k {options.k}, {len(indices):,} tokens, {records / 1e6:.1f} M records")
    rates = {name: records / seconds[name] / 1e6 for name in ("ours", "delphi")}
    rates["SAEDashboard"] = dashboard_records / seconds["SAEDashboard"] / 1e6
    for name, rate in rates.items():
        print(f"{name:13} {rate:8.3f} M records per CPU second; ours is {rates['ours'] / rate:.0f} times as fast")
    print(f"SAEDashboard  {1e3 * seconds['SAEDashboard'] / shown.size:.1f} ms a feature, with "
          f"{dashboard_records / shown.size:.0f} firings each")  # fmt: skip


if __name__ == "__main__":
    main()
