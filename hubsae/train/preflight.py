"""What would make a run fail, found before it begins: by the run itself and by a dry run alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError, DataError, FormatError
from hubsae.core.files import read_json
from hubsae.core.progress import say
from hubsae.core.scopes import excluding
from hubsae.train import checkpoint
from hubsae.train.config import TrainConfig
from hubsae.train.data import columns_of
from hubsae.train.export import joined


def check_settings(configs: Sequence[TrainConfig], d: int, rows: int, *, ranks: int = 1) -> None:
    """Raise where settings do not fit each other or the shape of the data."""
    first = configs[0]
    first.steps(rows)
    if first.batch_size % (ranks * first.accumulate):
        raise ConfigError(
            f"batch_size {first.batch_size} does not divide into {ranks} ranks x {first.accumulate} parts",
            hint="choose a multiple",
        )
    for config in configs:
        config.check(d)


def check_data(configs: Sequence[TrainConfig], source: Any, val: Any) -> None:
    """Raise where the data lack what the settings ask of them."""
    widths = [(d.d, getattr(d, "d_out", None)) for d in (source, val) if d is not None]
    if len(set(widths)) > 1:
        text = ["{} -> {}".format(*w) if w[1] is not None else str(w[0]) for w in widths]
        raise DataError(f"validation activations have width {text[1]}, training ones {text[0]}")
    for config in configs:
        if val is None and (config.metric or "").startswith("val_"):
            raise ConfigError(f"metric {config.metric} needs validation data", hint="pass val=, or set val_fraction")
        joined(config.record, source)
        columns = columns_of(excluding(config.excluded))
        for data in (source, val):
            missing = [name for name in columns if name not in getattr(data, "label_names", ())]
            if data is not None and missing:
                have = ", ".join(getattr(data, "label_names", ())) or "none"
                raise ConfigError(
                    f"exclude={list(config.excluded)} needs the label columns {', '.join(missing)}",
                    hint=f"columns there: {have}; ActivationDataset.from_tensor(x, position=...) gives a tensor some",
                )


def check_folder(out: Path, settings: dict[str, Any], states: Path | None = None) -> None:
    """Raise where a run folder holds a state of other settings."""
    file = out / "config.json"
    if not file.exists() or checkpoint.latest(states or out / "state") is None:
        return
    try:
        before = read_json(file)
        whole = before.pop("sha256") == checkpoint.digest(before)
    except (FormatError, AttributeError, KeyError):
        before, whole = {}, False
    if not whole:
        say(f"{file} was damaged and is written anew; the state itself is checked")
        return
    if before == settings:
        return
    wrong = [key for key in ("d_in", "rows") if before.get(key) != settings[key]]
    for old, new in zip(before.get("cells", []), settings["cells"], strict=False):
        wrong += [f"{new['name']}.{key}" for key in new if old.get(key) != new[key]]
    raise ConfigError(
        f"{out} holds a run with other settings: {', '.join(wrong) or 'another list of SAEs'}",
        hint="choose another folder, or start over there with resume=False (--fresh)",
    )


def settings_of(configs: Sequence[TrainConfig], source: Any) -> dict[str, Any]:
    """What a run folder belongs to."""
    return {"cells": [c.model_dump(mode="json") for c in configs], "d_in": source.d, "rows": source.n_rows}
