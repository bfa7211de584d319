"""A chain: the SAEs of successive checkpoints of one model, grouped by layer and k, each with its activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hubsae.core.errors import DataError, NotFoundError, nearest
from hubsae.core.sae import SAE
from hubsae.core.text import stage_step


class Link(NamedTuple):
    """One SAE of a chain."""

    stage: str
    """Name of the checkpoint, such as ppo_step116"""
    step: int | None
    """Its training step; None where neither the metadata nor the name says"""
    layer: int | None
    k: int | None
    sae: SAE


class Group(NamedTuple):
    """The stages of one layer and k, in order of step."""

    layer: int | None
    k: int | None
    links: list[Link]

    @property
    def name(self) -> str:
        """Short name for files and plots.

        >>> Group(18, 64, []).name, Group(None, None, []).name
        ('layer18_k64', 'sae')
        """
        parts = [] if self.layer is None else [f"layer{self.layer}"]
        parts += [] if self.k is None else [f"k{self.k}"]
        return "_".join(parts) or "sae"


def make_link(sae: SAE, stage: str | None = None, step: int | None = None) -> Link:
    """A link from what the SAE's metadata says, or what is given."""
    info = sae.metadata.base_model
    name = stage or info.stage
    if name is None:
        raise DataError(
            f"SAE {sae.metadata.id or ''} does not say of which stage it is",
            hint="give the chain as a mapping from stage names to SAEs",
        )
    found = step if step is not None else info.step if info.step is not None else stage_step(name)
    return Link(name, found, sae.metadata.hook.layer, sae.config.k, sae)


def make_groups(chain: Any) -> list[Group]:
    """Links of a chain given as SAEs, links, or a mapping from stages (or (stage, layer)) to SAEs."""
    links: list[Link] = []
    if isinstance(chain, Mapping):
        for key, item in chain.items():
            stage, layer = key if isinstance(key, tuple) else (key, None)
            for sae in item if isinstance(item, (list, tuple)) else [item]:
                link = make_link(sae, str(stage))
                links.append(link if layer is None else link._replace(layer=int(layer)))
    else:
        entries: Iterable[Any] = chain
        for item in entries:
            links.append(item if isinstance(item, Link) else make_link(item))
    if not links:
        raise DataError("the chain holds no SAEs")
    keys: dict[tuple[int | None, int | None], list[Link]] = {}
    for link in links:
        keys.setdefault((link.layer, link.k), []).append(link)
    groups = []
    for (layer, k), members in sorted(keys.items(), key=lambda item: tuple(v or -1 for v in item[0])):
        if all(link.step is not None for link in members):
            members = sorted(members, key=lambda link: link.step or 0)
        names = [link.stage for link in members]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(
                f"layer {layer}, k {k} has more than one SAE of stage {', '.join(twice)}",
                hint="a chain holds one SAE per stage, layer and k",
            )
        groups.append(Group(layer, k, members))
    return groups


def activations_for(activations: Any, link: Link) -> Any:
    """The activations of a stage and layer out of whatever holds them."""
    if isinstance(activations, Mapping) and not any(key in activations for key in ("x", "activations", "acts")):
        for key in ((link.stage, link.layer), link.stage, link.layer):
            if key in activations:
                return activations[key]
        raise NotFoundError(
            f"no activations for stage {link.stage!r}, layer {link.layer}",
            hint="given: " + nearest(str((link.stage, link.layer)), map(str, activations)),
        )
    return activations(link.stage, link.layer) if callable(activations) else activations
