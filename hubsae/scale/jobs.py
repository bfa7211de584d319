"""What can be cut into tasks: each job says what one task does, and what the last step does when all of them are done.

A job holds plain values, so that it can be written down and sent elsewhere. The data are cut into parts of a fixed size
(a window of samples, 262,144 rows, a file), whole or not at all; task r of n takes parts r, r + n, ... So what a part
holds depends on the data alone, and any number of tasks leaves the same bytes. `here` is the same work in one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hubsae.activations.ranks import Ranks
from hubsae.core.errors import HubSAEError
from hubsae.core.progress import progress, say

if TYPE_CHECKING:
    from hubsae.hub.sae import HubSAE

FOLDER = ".tasks"
STATES, PRODUCTS = "states", "products"
"""What tasks leave for each other: their sums, and by which backend they multiply, since rounding depends on it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work on the parts of something."""

    verb: ClassVar[str]

    @property
    def home(self) -> Path:
        """The folder that the result goes into."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where the tasks keep their records: job, logs, markers of what is done."""
        return self.home / FOLDER / self.verb

    def here(self) -> Any:
        """All of it in this process; under `torchrun` the share of this rank."""
        raise NotImplementedError

    def task(self, ranks: Ranks) -> None:
        """The parts of one task."""
        raise NotImplementedError

    def merge(self) -> Any:
        """The last step, when all parts are there."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What it is asked to do, as JSON; data given as a list are told by their hash.

        >>> Convert(path="piles", out="acts").record()["path"]
        'piles'
        """

        def plain(value: Any) -> Any:
            if isinstance(value, list) and len(text := json.dumps(value, default=str)) > 1000:
                return f"{len(value)} items, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
            return value

        said = {name: plain(value) for name, value in dataclasses.asdict(self).items()}
        return json.loads(json.dumps({"verb": self.verb, **said}, default=str))

    def key(self, **more: Any) -> str:
        """What it is asked to do, and more, as a short hash."""
        return hashlib.sha256(json.dumps([self.record(), more], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Harvest(Job):
    """Run texts through a model and write its activations (`hubsae.activations.harvest`), window by window."""

    verb: ClassVar[str] = "harvest"
    model: str
    dataset: Any
    """A name that `load_texts` takes, or the samples themselves."""
    layers: list[Any] | str
    """Hook points, or `all`."""
    out: str
    loading: dict[str, Any] = field(default_factory=dict)
    """Options of `load_texts`: config, split, streaming."""
    reward_model: str | None = None
    separator: str | None = None
    tokenizer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `harvest`; `window` is the number of samples of a part."""

    @property
    def home(self) -> Path:
        return Path(self.out)

    def here(self) -> Any:
        return self._harvest()

    def task(self, ranks: Ranks) -> None:
        self._harvest(rank=ranks.rank, world_size=ranks.world_size, parts=True, shard_seconds=None, progress=False)

    def merge(self) -> Any:
        from hubsae.activations.activation_set import ActivationSet
        from hubsae.activations.harvesting import complete_parts, missing_parts, parts_folder
        from hubsae.activations.layout import config_name
        from hubsae.core.hooks import HookPoint

        stage = self.options.get("stage")
        hooks = [hook.name for hook in sorted({HookPoint.parse(point) for point in self._points()})]
        markers = parts_folder(self.out, stage, hooks)
        if missing := missing_parts(markers):
            raise HubSAEError(
                f"{self.out}: {len(missing)} parts of this harvest are missing, though its tasks are marked as done",
                hint=f"remove {self.folder} and run it again: parts that are there are kept",
            )
        names = tokenizer_of(self.tokenizer or self.model)
        complete_parts(self.out, stage, markers, None if names is None else lambda token: names.decode([token]))
        return ActivationSet(self.out, [config_name(hook, stage) for hook in hooks])

    def _points(self) -> list[Any]:
        from hubsae.activations.models import layer_count

        if self.layers == "all":
            return list(range(layer_count(self.model, self.options.get("revision"))))
        return list(self.layers)

    def _harvest(self, **how: Any) -> Any:
        from hubsae.activations.harvesting import harvest
        from hubsae.activations.models import load_tokenizer
        from hubsae.activations.texts import load_texts

        rows, source = self.dataset, None
        if isinstance(rows, str):
            rows, source = load_texts(rows, **self.loading)
        scorers = {}
        if self.reward_model is not None:
            from hubsae.rl.reward_models import HarvestScorer, load_reward_model

            device = self.options.get("device") or "cpu"
            found = load_reward_model(self.reward_model, separator=self.separator, device=device)
            scorers["reward"] = HarvestScorer(found, self.separator)
        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        options = {**self.options, **how}
        return harvest(
            self.model,
            rows,
            self._points(),
            out=self.out,
            tokenizer=tokenizer,
            scorers=scorers,
            source=source,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class OfRelease(Job):
    """Work on SAEs of a release."""

    release: str
    out: str | None = None
    """Otherwise into the release."""
    config: str | None = None
    """Of the activations, and so is the split."""
    split: str | None = None
    filters: dict[str, Any] = field(default_factory=dict)
    """Which SAEs: id, layer, stage, k."""
    device: str = "cpu"
    force: bool = False

    def saes(self, device: str | None = None) -> Any:
        """The SAEs, loaded."""
        from hubsae.hub.measured import load

        return load(self.release, device or self.device, **self.filters)


@dataclass(frozen=True, kw_only=True)
class Index(OfRelease):
    """Make the reverse index of SAEs (`hubsae.index.build`), from activations or from a model and texts."""

    verb: ClassVar[str] = "index"
    activations: str | None = None
    texts: str | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `hubsae.index.build.Settings`."""
    max_texts: int | None = None
    max_length: int | None = None

    @property
    def home(self) -> Path:
        from hubsae.index.files import FOLDER as INDEX

        return Path(self.out) if self.out is not None else Path(self.release) / INDEX

    def here(self) -> list[Path]:
        return self._written(self._index(None, finish=True))

    def task(self, ranks: Ranks) -> None:
        self._index(ranks, finish=False)

    def merge(self) -> list[Path]:
        job = dataclasses.replace(self, device=_at_hand(self.device))
        return self._written(job._index(Ranks(), finish=True))

    def _written(self, folders: list[Path]) -> list[Path]:
        if self.out is not None:
            return folders
        from hubsae.index.page import build

        return [*folders, build(Path(self.release))]  # the page that shows them, hubsae view

    def _index(self, ranks: Ranks | None, *, finish: bool) -> list[Path]:
        from hubsae.evals.passes import agree_on_products
        from hubsae.hub.measured import together
        from hubsae.index.build import Settings, index_activations, index_texts

        saes = self.saes()
        if ranks is not None:
            agree_on_products(saes, self.folder / PRODUCTS)
        settings, model, tokenizer = Settings(**self.settings), None, None
        if self.model is not None:
            from hubsae.activations.models import load_model, load_tokenizer

            model, tokenizer = load_model(self.model, device=self.device), load_tokenizer(self.model)
        how: dict[str, Any] = {"force": self.force, "ranks": ranks, "finish": finish, "show": None if finish else False}
        if self.texts is not None:
            from hubsae.evals.texts import read_texts

            texts = read_texts(self.texts)[: self.max_texts]
            how |= {"tokenizer_id": self.model, "max_length": self.max_length}
            return index_texts(saes, model, tokenizer, texts, self.home, settings, **how)  # pyright: ignore[reportArgumentType]
        written = []
        for data, group in together(saes, str(self.activations), self.config, self.split):
            name = self.model or data.info.get("model")
            how |= {"tokenizer": tokenizer or tokenizer_of(name, say), "tokenizer_id": name, "model": model}
            written += index_activations(group, data, self.home, settings, **how)
        return written


@dataclass(frozen=True, kw_only=True)
class Evaluate(OfRelease):
    """Measure how SAEs reconstruct activations (`hubsae.evals.reconstruction`); the result goes where cards find it."""

    verb: ClassVar[str] = "eval"
    activations: str
    scopes: list[str] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return Path(self.out if self.out is not None else self.release)

    def here(self, saes: dict[str, HubSAE] | None = None) -> list[dict[str, Any]]:
        """All of it in this process, of SAEs that are loaded already where they are."""
        from hubsae.evals.reconstruction import reconstruction

        def measure(group: Any, data: Any) -> Any:
            title = f"{data.config} {data.split}, {len(group)} SAEs"
            return reconstruction(group, data, scopes=self.scopes, force=self.force, show=None, name=title)

        return self._result(measure, saes)

    def task(self, ranks: Ranks) -> None:
        from hubsae.evals.passes import agree_on_products
        from hubsae.evals.reconstruction import reconstruct_parts

        for data, group in self._groups():
            agree_on_products(group, self.folder / f"{PRODUCTS}.{data.config}.{data.split}")
            reconstruct_parts(group, data, self._states(data), scopes=self.scopes, force=self.force, ranks=ranks)

    def merge(self) -> list[dict[str, Any]]:
        from hubsae.evals.reconstruction import merged_reconstruction

        def whole(group: Any, data: Any) -> Any:
            return merged_reconstruction(group, data, self._states(data), scopes=self.scopes, force=self.force)

        return self._result(whole, self.saes(_at_hand(self.device)))

    def _states(self, data: Any) -> Path:
        return self.folder / STATES / self.key() / f"{data.config}.{data.split}"

    def _groups(self, saes: dict[str, HubSAE] | None = None) -> list[tuple[Any, dict[str, HubSAE]]]:
        from hubsae.hub.measured import together

        return together(saes or self.saes(), self.activations, self.config, self.split)

    def _result(self, measure: Callable[[Any, Any], Any], saes: Any = None) -> list[dict[str, Any]]:
        """Every group of SAEs measured, written, and returned as rows."""
        from hubsae.evals.record import record_reconstruction
        from hubsae.evals.results import ReconstructionResult
        from hubsae.formats.release import Release

        measured: dict[str, Any] = {}
        tokens, found = 0, []
        for data, group in self._groups(saes):
            result = measure(group, data)
            measured.update(result.saes)
            tokens, found = tokens + result.n_tokens, result.scopes
        whole = ReconstructionResult(measured, tokens, found)
        if self.out is not None:
            whole.write(Path(self.out))
        else:
            record_reconstruction(Release.open(self.release), whole)
        return whole.rows()


@dataclass(frozen=True, kw_only=True)
class Convert(Job):
    """Rewrite activations of another layout into ours (`hubsae.activations.convert`), file by file."""

    verb: ClassVar[str] = "convert-activations"
    path: str
    out: str
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `convert`."""

    @property
    def home(self) -> Path:
        return Path(self.out)

    def here(self) -> Path:
        from hubsae.activations.convert import convert

        with progress("converting", unit="tokens") as task:
            return convert(self.path, self.out, progress=task.advance, **self.options)

    def task(self, ranks: Ranks) -> None:
        from hubsae.activations.convert import convert

        convert(self.path, self.out, ranks=ranks, **self.options)

    def merge(self) -> Path:
        self.task(Ranks())
        return Path(self.out)


def _at_hand(device: str) -> str:
    """Where the last step works: a machine that only submits tasks need not have their GPU."""
    import torch

    return "cpu" if torch.device(device).type == "cuda" and not torch.cuda.is_available() else device


def tokenizer_of(name: str | None, notify: Callable[[str], None] | None = None) -> Any:
    """The tokenizer of a model where it can be had; without one tokens are shown by number."""
    from hubsae.activations.models import load_tokenizer

    try:
        return load_tokenizer(name) if name else None
    except HubSAEError as error:
        if notify is not None:
            notify(f"tokens are shown by number: {error}")
        return None
