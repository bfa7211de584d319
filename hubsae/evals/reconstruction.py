"""How well SAEs reconstruct activations: one streaming pass, any number of SAEs, every number named.

The pass is `passes.py`, what it adds up `accumulate.py`; the sums are read off as measures, per-latent statistics, a
density histogram and explained variance by norm decile. The result is the same, bit for bit, for every batch size and
every number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (used by the example)

from hubsae.activations.ranks import Ranks
from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.core.scopes import Scope, parse
from hubsae.evals.passes import Rows, name_saes, part_name, parts_of, run_pass
from hubsae.evals.places import check_place, check_target, place_of
from hubsae.evals.read_off import Reconstruction
from hubsae.evals.results import ReconstructionResult


def own_scopes(saes: Mapping[str, SAE], columns: Sequence[str]) -> list[Scope]:
    """The scopes that SAEs are for, by their records; one whose label columns are not there is warned about."""
    found: dict[str, Scope] = {}
    for label, sae in saes.items():
        scope = parse(sae.metadata.own_scope, sae.metadata.training.massive_above)
        missing = [c for c in scope.columns if c not in columns]
        if missing:
            warnings.warn(
                f"SAE {label!r} is for the tokens {scope.name!r}; these activations have no column "
                f"{missing[0]!r}, so its headline numbers cannot be measured on them",
                stacklevel=3,
            )
        elif scope.name in found and found[scope.name].massive_above != scope.massive_above:
            raise DataError(
                f"SAE {label!r} draws the line of {scope.name!r} at another norm than those beside it",
                hint="measure it in a pass of its own",
            )
        else:
            found[scope.name] = scope
    return list(found.values())


def prepare(
    saes: Mapping[str, SAE] | Sequence[SAE] | SAE,
    activations: Any,
    *,
    scopes: Sequence[str | Scope] = (),
    columns: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    force: bool = False,
) -> tuple[Rows, dict[str, SAE], Reconstruction]:
    """What a pass needs: the rows, the SAEs by name, and the accumulator of the metrics.

    Scopes asked for may use `massive`; its bound is that of the SAEs' records.
    """
    named = name_saes(saes)
    rows = activations if isinstance(activations, Rows) else Rows(activations, columns, batch_size=batch_size)
    for label, sae in named.items():
        check_target(label, sae, rows.d_out)
    if not force:
        hook, model = place_of(rows.data)
        hook_out = place_of(rows.data.target)[0] if rows.d_out is not None else None
        for label, sae in named.items():
            check_place(label, sae, hook, model, hook_out)
    own = own_scopes(named, rows.columns)
    bound = next((s.metadata.training.massive_above for s in named.values() if s.metadata.training.massive_above), None)
    asked = [scope if isinstance(scope, Scope) else parse(scope, bound) for scope in scopes]
    for scope in asked:
        missing = [c for c in scope.columns if c not in rows.columns]
        if missing:
            raise DataError(
                f"scope {scope.name!r} needs the label column {missing[0]!r}",
                hint=f"columns here: {', '.join(rows.columns)}",
            )
    return rows, named, Reconstruction(named, rows.columns, [*own, *asked])


def reconstruction(
    saes: Mapping[str, SAE] | Sequence[SAE] | SAE,
    activations: Any,
    *,
    scopes: Sequence[str | Scope] = (),
    batch_size: int | None = None,
    position: Any = None,
    is_prompt: Any = None,
    sample_id: Any = None,
    columns: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    force: bool = False,
    show: bool | None = False,
    name: str = "activations",
) -> ReconstructionResult:
    """Evaluate SAEs on the same activations in one pass.

    `activations` is a tensor [tokens, d], a mapping with `x` and label columns, or an ActivationDataset; for
    transcoders, PairedActivations: they are measured against the output, in its space. Labels
    (`position` of the token in its sequence, `is_prompt`, `sample_id`, and any others in `columns`) open the scopes and
    make the intervals those of whole samples. The usual scopes and each SAE's own are measured, and those in `scopes`,
    such as "role=user & not position_0". `batch_size` only says how to read; it changes no number. Under torchrun ranks
    share the work and all get the whole result.

    >>> from hubsae import HubSAE, SAEConfig
    >>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
    >>> x = torch.randn(64, 4, generator=torch.manual_seed(0))
    >>> result = reconstruction(sae, x)
    >>> result["sae0"].value("mse") == reconstruction(sae, x, batch_size=7)["sae0"].value("mse")
    True
    >>> reconstruction(sae, x, position=torch.arange(64) % 8).scopes
    ['all', 'not position_0', 'position_0']
    """
    labels = {"position": position, "is_prompt": is_prompt, "sample_id": sample_id, **(columns or {})}
    rows, named, sums = prepare(saes, activations, scopes=scopes, columns=labels, batch_size=batch_size, force=force)
    return run_pass(rows, named, [sums], ranks=ranks, show=show, name=name)[0]


def reconstruct_parts(
    saes: Mapping[str, SAE],
    activations: Any,
    folder: str | Path,
    *,
    scopes: Sequence[str | Scope] = (),
    ranks: Ranks | None = None,
    force: bool = False,
) -> None:
    """The parts of an evaluation that are this rank's: a state of each into `folder`, where it is not there yet."""
    ranks = ranks or Ranks.find()
    rows, named, _ = prepare(saes, activations, scopes=scopes, force=force)
    for part in parts_of(rows)[ranks.rank :: ranks.world_size]:
        if not (file := Path(folder) / part_name(part)).is_file():
            sums = prepare(saes, rows, scopes=scopes, force=force)[2]
            run_pass(rows, named, [sums], blocks=part, ranks=Ranks())
            sums.save(file)


def merged_reconstruction(
    saes: Mapping[str, SAE],
    activations: Any,
    folder: str | Path,
    *,
    scopes: Sequence[str | Scope] = (),
    force: bool = False,
) -> ReconstructionResult:
    """The result of an evaluation whose parts are all in `folder`; the same as `reconstruction`, to the last bit."""
    rows, _, whole = prepare(saes, activations, scopes=scopes, force=force)
    files = [Path(folder) / part_name(part) for part in parts_of(rows)]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{len(missing)} of {len(files)} parts of this evaluation are missing: {missing[0]} ...")
    for number, file in enumerate(files):
        sums = whole if number == 0 else prepare(saes, rows, scopes=scopes, force=force)[2]
        sums.load(file)
        if sums is not whole:
            whole.merge(sums)
    return whole.result()
