"""Config of a recipe: a profile, a variant on top of it, and `key.path=value` overrides, checked by a schema."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hubsae.core.errors import ConfigError, FormatError, nearest


class Settings(BaseModel):
    """Base of every recipe's config and of its sections: unknown keys are errors, values do not change.

    >>> class Config(Settings):
    ...     seed: int = 0
    >>> Config(seed="3").seed
    3
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Settings)


def compose(schema: type[C], layers: Iterable[dict[str, Any]], overrides: Sequence[str] = ()) -> C:
    """Merge `layers` (later ones win, section by section), apply overrides, validate.

    >>> class Config(Settings):
    ...     lr: float = 1.0
    >>> compose(Config, [{"lr": 2}], ["lr=1e-4"]).lr
    0.0001
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    known = set(key_paths(schema))
    for override in overrides:
        key, value = parse_override(override)
        if key not in known:
            raise ConfigError(f"the config has no key {key!r}", hint=f"nearest: {nearest(key, sorted(known))}")
        merged = merge(merged, nested(key, value))
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        lines = "\n  ".join(["the config is not valid:", *problems(error, known)])
        raise ConfigError(lines) from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings are merged, everything else is replaced.

    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def nested(key: str, value: Any) -> dict[str, Any]:
    """A value at a dotted key, as a mapping to merge.

    >>> nested("a.b", 1)
    {'a': {'b': 1}}
    """
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key.path=value`; the value is read as YAML.

    >>> parse_override("chain.layers=[1, 3]")
    ('chain.layers', [1, 3])
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not an override", hint="write key.path=value, for example rl.steps=20")
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return key.strip(), float(value)  # YAML 1.1 reads 1e-4 as text
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key!r} is not YAML: {value!r} ({error})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FormatError(path, "YAML", f"text that does not parse ({error})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(path, "a mapping", type(value).__name__)
    return value


def key_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key a config may have.

    >>> class Config(Settings):
    ...     seed: int = 0
    ...     lr: float = 1.0
    >>> list(key_paths(Config))
    ['seed', 'lr']
    """
    for name, info in schema.model_fields.items():
        yield prefix + name
        inner = [info.annotation, *get_args(info.annotation)]
        for kind in inner:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from key_paths(kind, f"{prefix}{name}.")


def to_yaml(config: BaseModel) -> str:
    """The config as YAML, complete."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def problems(error: ValidationError, known: Iterable[str] = ()) -> list[str]:
    """What is wrong, a line each: which key, what was expected, what was found; nearest keys are of those `known`."""
    lines, known = [], sorted(known)
    for problem in error.errors():
        key, found = ".".join(str(part) for part in problem["loc"]), repr(problem["input"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: no such key (nearest: {nearest(key, known)})" if known else f"unknown key {key!r}")
        elif problem["type"] == "missing":
            lines.append(f"required key {key!r} is missing")
        elif not key:  # a rule about several values says itself which
            lines.append(problem["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key}: {problem['msg']} (found {found[:80]})")
    return lines
