"""The card of an activation dataset: `configs:` so that every tool can load it, and a text rendered from the manifest.

A card that a person has edited is not overwritten: only our block between its markers and our front matter change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hubsae.core.bundled import bundled
from hubsae.core.files import write_text_atomic
from hubsae.core.readme import update
from hubsae.core.text import printable

BLOCK = "activations"
TEMPLATE = "activation_dataset.md.j2"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_MORE = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))


def front_matter(manifest: dict[str, Any]) -> dict[str, Any]:
    """The metadata the Hub and `datasets` read."""
    configs = []
    for number, (name, entry) in enumerate(manifest["configs"].items()):
        files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in entry["splits"]]
        configs.append({"config_name": name, "data_files": files, **({"default": True} if number == 0 else {})})
    rows = max(sum(s["rows"] for s in c["splits"].values()) for c in manifest["configs"].values())
    size = next((label for limit, label in (*_SIZES, *_MORE) if rows < limit), "1B<n<10B")
    return {
        "library_name": "hubsae",
        "tags": ["hubsae", "activations", "interpretability", "sparse-autoencoder"],
        "size_categories": [size],
        "configs": configs,
    }


def render_body(manifest: dict[str, Any], repo_id: str | None = None) -> str:
    """The text between the markers."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(bundled("cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    environment.filters["code"] = _code
    first = next(iter(manifest["configs"].values()))
    sources = [entry["source"] for entry in manifest["configs"].values()]
    shared = {k: v for k, v in sources[0].items() if all(s.get(k) == v for s in sources)}
    return environment.get_template(TEMPLATE).render(
        manifest=manifest, first=first, shared=shared, repo=repo_id or "OWNER/NAME", run=manifest.get("run", {})
    )


def _code(text: str) -> str:
    """A token's text, whatever it holds, as code in a sentence."""
    return "`" + printable(json.dumps(text, ensure_ascii=False)).replace("`", "'") + "`"


def _number(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def write_card(root: Path, manifest: dict[str, Any]) -> Path:
    """Write or update `README.md` of a dataset folder."""
    path = root / "README.md"
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    return write_text_atomic(path, update_card(existing, manifest))


def update_card(existing: str | None, manifest: dict[str, Any], repo_id: str | None = None) -> str:
    """The card with its rendered block brought up to date; what a person wrote around it, or in it, stays."""
    return update(existing, front_matter(manifest), {BLOCK: render_body(manifest, repo_id)}).text
