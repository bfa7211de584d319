"""Load the model to harvest from, with an adapter merged in float32, and say exactly what it is."""

from __future__ import annotations

import copy
import hashlib
import os
import socket
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from hubsae.core.errors import ConfigError, HubSAEError, NotFoundError
from hubsae.core.extras import require


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """A causal language model in evaluation mode.

    Without `dtype`: float32 on a CPU or with an adapter, else the checkpoint's own. An adapter is always merged in
    float32, since small updates vanish in a bfloat16 merge, and the result is then cast.
    """
    transformers = require("transformers", extra="train")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = as_dtype(dtype) if dtype is not None else None
    if wanted is None and (adapter is not None or place.type == "cpu"):
        wanted = torch.float32
    options = _where(model, revision, token)
    if "local_files_only" in options:  # transformers looks for an adapter first, with options of its own
        options["adapter_kwargs"] = {"local_files_only": True}
    options["dtype"] = torch.float32 if adapter is not None else wanted or "auto"
    try:
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(str(model), **options)
        except ValueError as error:  # a reward model, say, has no language-model head
            if "Unrecognized configuration class" not in str(error):
                raise
            loaded = transformers.AutoModel.from_pretrained(str(model), **options)
    except OSError as error:
        raise not_loaded(model, error) from error
    if adapter is not None:
        loaded = merge_adapter(loaded, adapter, token=token)
        if wanted is not None:
            loaded = loaded.to(wanted)
    return loaded.to(place).eval()


def merge_adapter(model: nn.Module, adapter: str | Path, *, token: str | bool | None = None) -> nn.Module:
    """`model` with a LoRA adapter merged into its float32 weights; the model given is not changed."""
    peft = require("peft", extra="train")
    base = copy.deepcopy(model).float()
    try:
        merged = peft.PeftModel.from_pretrained(base, str(adapter), token=token).merge_and_unload(safe_merge=True)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise HubSAEError(
            f"adapter {adapter} cannot be merged: {str(error).splitlines()[0]}",
            hint="give a peft folder with adapter_config.json that was trained on this base model",
        ) from error
    return merged


def load_tokenizer(model: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Any:
    """The tokenizer beside a model."""
    transformers, where = require("transformers", extra="train"), _where(model, revision, token)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(model), **where)
    except (OSError, ValueError) as error:
        try:
            transformers.AutoConfig.from_pretrained(str(model), **where)
        except (OSError, ValueError) as missing:  # it is not the tokenizer that is missing
            raise not_loaded(model, missing) from error
        raise NotFoundError(
            f"no tokenizer in {model}: {str(error).splitlines()[0]}", hint="name another one with tokenizer="
        ) from error


def _where(model: str | Path, revision: str | None, token: str | bool | None) -> dict[str, Any]:
    """Options of `from_pretrained`. A Hub that does not answer is not asked: its client would try every file of a
    model for half a minute before it looked into the cache."""
    where: dict[str, Any] = {"revision": revision, "token": token}
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if not Path(model).exists() and address.scheme not in getproxies():
        try:
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname or "", port), timeout=5).close()
        except OSError:
            where["local_files_only"] = True
    return where


def not_loaded(model: str | Path, error: Exception) -> NotFoundError:
    """The error for a model that is not there, or is there and cannot be read."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    path = Path(model)
    if path.is_dir():
        return NotFoundError(
            f"model {model} cannot be loaded: {text}", hint="a folder of a model holds config.json and weights"
        )
    if not any(sign in str(error) for sign in ("not a local folder", "not a valid model identifier", "Repo id must")):
        return NotFoundError(
            f"model {model} cannot be loaded: {text}",
            hint="give a folder with config.json and weights, or a model id (`hf auth login` for gated ones)",
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() and path.name else []
    near = get_close_matches(path.name, beside, cutoff=0.6)
    hint = f"did you mean {path.parent / near[0]}?" if near else "check its spelling; `hf auth login` for gated models"
    return NotFoundError(f"there is no model {model}: no such folder here, no such repo at {endpoint}", hint=hint)


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """A floating-point type by its name.

    >>> as_dtype("bfloat16")
    torch.bfloat16
    """
    found = name if isinstance(name, torch.dtype) else getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{name!r} is no floating-point type", hint="choose float32, bfloat16 or float16")
    return found


def weights_id(model: nn.Module) -> str:
    """A short id of a model's weights: a resumed harvest refuses other weights under the same name."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        digest.update(name.encode() + flat[::step][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def layer_count(model: str | Path, revision: str | None = None) -> int:
    """How many decoder layers a model has, from its config alone."""
    transformers = require("transformers", extra="train")
    try:
        config = transformers.AutoConfig.from_pretrained(str(model), revision=revision)
    except (OSError, ValueError) as error:
        raise not_loaded(model, error) from error
    return int(config.get_text_config().num_hidden_layers)
