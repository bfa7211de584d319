"""Where training data come from, as sections of metadata.json: what the activations say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubsae.core.errors import ConfigError, HookError
from hubsae.core.hooks import HookPoint
from hubsae.core.settings import merge

# section and field of metadata.json -> what a harvest calls it
KNOWN = {
    ("base_model", "id"): "model",
    ("base_model", "revision"): "revision",
    ("base_model", "stage"): "stage",
    ("base_model", "adapter"): "adapter",
    ("base_model", "merge_dtype"): "adapter_merge",
    ("base_model", "dtype"): "model_dtype",
    ("hook", "layer"): "layer",
    ("hook", "kind"): "kind",
    ("hook", "module_path"): "hook_point",
    ("hook", "transformer_lens"): "transformer_lens",
    ("hook", "context_size"): "max_length",
    ("activations", "mode"): "mode",
    ("activations", "text_dataset"): "dataset",
}


def recorded(source: Any) -> dict[str, dict[str, Any]]:
    """Model, hook point and dataset of activations, as far as they are known."""
    info = getattr(source, "info", None)
    if not info:
        return {}
    out: dict[str, dict[str, Any]] = {}
    for (section, field), key in KNOWN.items():
        if info.get(key) is not None:
            out.setdefault(section, {})[field] = _public(info[key]) if field in ("id", "adapter") else info[key]
    if (target := getattr(source, "target", None)) is not None:
        said = target.info
        fields = {field: said.get(key) for (section, field), key in KNOWN.items() if section == "hook"}
        out["hook_out"] = {field: value for field, value in fields.items() if value is not None}
    about = out.setdefault("activations", {})
    about["tokens"] = source.n_rows
    about |= {"id": _public(source.path), "config": source.config} if hasattr(source, "config") else {}
    return out


def joined(record: dict[str, Any], source: Any) -> dict[str, Any]:
    """What a config puts on record, on top of what the activations say; a contradicting hook point is an error.

    >>> class Acts:
    ...     info, n_rows, path, config = {"layer": 8, "hook_point": "model.layers.8"}, 10, "acts", "layers.8"
    >>> joined({"hook": {"kind": "resid_post"}}, Acts())["hook"]["layer"]
    8
    """
    found = recorded(source)
    hook, own = found.get("hook", {}), record.get("hook") or {}
    said, here = _point(own), _point(hook)
    if said is not None and here is not None and said != here:
        raise ConfigError(
            f"record.hook says {said.name}, the activations were taken at {here.name}",
            hint="leave record.hook out: it is read from the activations; or train on those of that hook point",
        )
    model, theirs = (record.get("base_model") or {}).get("id"), found.get("base_model", {}).get("id")
    if model and theirs and model != theirs and "/" in model and "/" in theirs:
        raise ConfigError(
            f"record.base_model says {model}, the activations are of {theirs}",
            hint="leave record.base_model out (base_model: null): it is read from the activations",
        )
    return merge(found, {section: values for section, values in record.items() if values is not None})


def _point(hook: dict[str, Any]) -> HookPoint | None:
    """The hook point that a section means, by whichever of its fields says it."""
    try:
        for field in ("transformer_lens", "module_path"):
            if hook.get(field):
                return HookPoint.parse(hook[field])
        if hook.get("layer") is not None:
            return HookPoint(int(hook["layer"]), hook.get("kind") or "resid_post")
    except HookError:
        pass  # a hook point of another kind of model
    return None


def _public(name: Any) -> str:
    """An id as it is; of a local path only its name, since a record goes to others."""
    path = Path(str(name))
    return path.name if path.is_absolute() or path.exists() or str(name).startswith(".") else str(name)
