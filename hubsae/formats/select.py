"""Choose among the SAEs of a release, a repo or a folder: by id, or by what is known of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar

from hubsae.core.errors import AmbiguousSAEError, ConfigError, SAENotFoundError, nearest
from hubsae.core.text import natural_key, printable
from hubsae.formats.names import stem_of


class Filters(TypedDict, total=False):
    """Filters as keywords; where several values are given, any of them fits."""

    layer: int | Sequence[int] | None
    stage: str | Sequence[str] | None
    k: int | Sequence[int] | None
    architecture: str | Sequence[str] | None
    d_in: int | Sequence[int] | None
    d_sae: int | Sequence[int] | None
    hook_point: str | Sequence[str] | None
    base_model: str | None
    base_model_revision: str | None


FILTERS = tuple(Filters.__annotations__)


def chosen_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """The filters among what a function was given (its `locals()`)."""
    return {name: given[name] for name in FILTERS}


class Selectable(Protocol):
    """One SAE of a list: its id, its folder or file, and what is known of it, by the names of `FILTERS`.

    Where that is `certain`, what it lacks is known not to be so; of a bare file it is only unknown.
    """

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def certain(self) -> bool: ...


E = TypeVar("E", bound=Selectable)


def pick(entries: Sequence[E], id: str | None = None, filters: Mapping[str, Any] | None = None, *, where: str) -> E:
    """The one SAE that is meant, or an error that lists what could be; `where` is named in errors."""
    found = select(entries, id, filters, where=where)
    if len(found) == 1:
        return found[0]
    telling = [f"{name}=" for name in FILTERS if len({str(e.facts.get(name)) for e in found}) > 1][:3]
    raise AmbiguousSAEError(
        f"{len(found)} SAEs of {where} fit{_wanted(id, filters)}; which one?\n{_listed(found)}",
        hint=f"give an id (the first column), or filters that leave one: {', '.join(telling or ['layer=', 'stage='])}",
    )


def select(
    entries: Sequence[E], id: str | None = None, filters: Mapping[str, Any] | None = None, *, where: str
) -> list[E]:
    """Every SAE that fits; an error with the nearest choices if there is none.

    An id may leave out a file's suffix, or name a folder of SAEs. A filter has a value, or several to choose from.
    """
    if not entries:
        raise SAENotFoundError(
            f"{where} holds no SAE in a format that hubsae reads",
            hint=f"its files: `hubsae show {where}`; formats: `hubsae formats`, or docs/formats.md",
        )
    given = {name: value for name, value in (filters or {}).items() if value is not None}
    for name in given:
        if name not in FILTERS:
            raise ConfigError(f"SAEs cannot be chosen by {name!r}", hint=f"choose by {', '.join(FILTERS)}")
    named = list(entries) if id is None else _by_id(entries, id, where)
    fitting = [e for e in named if all(_fits(e, name, value) for name, value in given.items())]
    if fitting:
        return fitting
    problems = []
    for name in given:
        there = {e.facts[name] for e in named if e.facts.get(name) is not None}
        if not any(_fits(e, name, given[name]) for e in named):
            shown = printable(", ".join(sorted(map(str, there), key=natural_key)))
            problems.append(f"{name}: {shown or 'not known'}")
    hint = "there are " + "; ".join(problems) if problems else f"SAEs there:\n{_listed(named)}"
    raise SAENotFoundError(f"no SAE of {where} fits{_wanted(id, filters)}", hint=hint)


def short_id(id: str) -> str:
    """An id without the suffix of its file, which may be left out when asking for it."""
    folder, slash, file = id.rpartition("/")
    return f"{folder}{slash}{stem_of(file)}"


def _by_id(entries: Iterable[E], id: str, where: str) -> list[E]:
    wanted = id.strip("/").removeprefix("./") or "."
    # a whole id first: a push of hundreds asks for each of them
    if exact := [e for e in entries if e.id == wanted or e.path == wanted]:
        return exact
    found = [e for e in entries if short_id(e.id) == wanted]
    # a folder of SAEs: filters may leave one of it
    if found := found or [e for e in entries if e.id.startswith(f"{wanted}/")]:
        return found
    raise SAENotFoundError(
        f"{where} has no SAE {id!r}",
        hint=f"nearest: {printable(nearest(wanted, [e.id for e in entries]))}\n     all: hubsae ls {where}",
    )


def _fits(entry: Selectable, name: str, value: Any) -> bool:
    known = entry.facts.get(name)
    if known is None:  # what a file's name does not say may still be so; the reader gets it as a choice
        return not entry.certain
    several = isinstance(value, Collection) and not isinstance(value, str)
    return known in value if several else known == value


def _wanted(id: str | None, filters: Mapping[str, Any] | None) -> str:
    parts = [repr(id)] if id is not None else []
    parts += [f"{name}={value!r}" for name, value in (filters or {}).items() if value is not None]
    return f" {', '.join(parts)}" if parts else ""


def _listed(entries: Sequence[Selectable], most: int = 12) -> str:
    lines = []
    for entry in entries[:most]:
        known = [f"{n} {entry.facts[n]}" for n in ("layer", "stage", "architecture", "k", "d_sae") if n in entry.facts]
        lines.append(printable(f"       {entry.id}" + (f"  ({', '.join(known)})" if known else "")))
    if len(entries) > most:
        lines.append(f"       ... and {len(entries) - most} more")
    return "\n".join(lines)
