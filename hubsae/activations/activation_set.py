"""The configs of one dataset folder together, as a harvest returns them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hubsae.activations.dataset import ActivationDataset
from hubsae.activations.layout import configs_in


class ActivationSet(Mapping[str, ActivationDataset]):
    """The configs of a dataset folder, opened when asked for: `harvested["layers.6"]`."""

    def __init__(self, path: str | Path, configs: Sequence[str] | None = None):
        self.path = Path(path)
        self.configs = list(configs) if configs is not None else configs_in(self.path)

    def __getitem__(self, config: str) -> ActivationDataset:
        return self.open(config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    def __repr__(self) -> str:
        return f"ActivationSet({str(self.path)!r}, {self.configs})"

    def open(self, config: str, split: str = "train", **options: Any) -> ActivationDataset:
        """One config and split."""
        return ActivationDataset.open(self.path, config, split, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish the folder."""
        return cast(Any, self[self.configs[0]]).push_to_hub(repo_id, **options)
