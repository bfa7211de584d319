"""Metrics of SAEs while they train: what the exported SAEs do on validation rows, by the pass engine of the evals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hubsae.activations.ranks import Ranks
from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.core.scopes import Scope
from hubsae.evals.passes import BLOCK_ROWS, run_pass
from hubsae.evals.reconstruction import prepare
from hubsae.train import data
from hubsae.train.result import VALIDATED


def measure(saes: Mapping[str, SAE], val: data.Source, scope: Scope, *, limit: int) -> dict[str, dict[str, float]]:
    """Metrics by name of the SAE, of raw activations and the tokens that take part; of about `limit` rows."""
    rows: Any = val.rows if isinstance(val, data.TensorSource) else val
    if not hasattr(rows, "label_names") and not isinstance(rows, Tensor):
        rows = data.sample(val, limit, 0).x  # a source of one's own
    table, named, sums = prepare(saes, rows, scopes=[scope], force=True)
    blocks = (0, -(-min(limit, val.n_rows) // BLOCK_ROWS))
    # every rank reads all rows: ranks that train apart come here at different times
    (found,) = run_pass(table, named, [sums], blocks=blocks, ranks=Ranks())
    out = {}
    for name in saes:
        values = {key: found[name].value(metric, scope.name) for key, metric in VALIDATED.items()}
        if not (n_tokens := found[name].get("mse", scope.name).n_tokens):
            raise DataError("every validation token is left out", hint="leave out fewer (exclude, max_norm_factor)")
        out[name] = {key: value for key, value in values.items() if value is not None} | {"val_rows": n_tokens}
    return out
