"""Submit a job to Hugging Face Jobs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import huggingface_hub

from hubsae.core.errors import ConfigError, HubRequestError


def submit(request: Mapping[str, Any], *, token: str | None = None) -> str:
    """Start a job and return its id. `secrets` are names, whose values come from the environment; HF_TOKEN is `token`.

    `volumes` hold what `huggingface_hub.Volume` takes; the rest is as `huggingface_hub.run_job` has it.
    """
    if not hasattr(huggingface_hub, "Volume"):
        raise HubRequestError(
            f"huggingface_hub {huggingface_hub.__version__} mounts no buckets into jobs",
            hint="pip install -U huggingface_hub",
        )
    token = token or huggingface_hub.get_token()
    values = {name: token if name == "HF_TOKEN" else os.environ.get(name) for name in request["secrets"]}
    if missing := [name for name, value in values.items() if not value]:
        raise ConfigError(f"the secret {missing[0]} is not set", hint=f"export {missing[0]}=..., or hf auth login")
    volumes = [huggingface_hub.Volume(**volume) for volume in request["volumes"]]
    given = {**request, "secrets": values, "volumes": volumes, "token": token}
    return huggingface_hub.run_job(**given).id
