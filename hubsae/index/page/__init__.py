"""The feature pages of a release: one HTML file over the tables of its reverse indexes, no server, no other origin.

`index.html` holds style, code and the list of indexes; a browser reads `reverse-index/NAME/summary.parquet` whole and
one row group of `features.parquet` per feature. hyparquet (MIT, its licence beside it) is bundled in.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.files import write_text_atomic

FOLDER = "reverse-index"
TABLES = ("summary.parquet", "features.parquet")
_HERE = Path(__file__).parent
_KEYS = ("id", "layer", "hook", "base_model", "architecture", "d_sae", "k", "stage")


def indexes(release: Path) -> list[dict[str, Any]]:
    """What the page needs to know of each index in a release folder, in the order of their names."""
    found = []
    for path in sorted((release / FOLDER).glob("*/summary.json")):
        if not all((path.parent / name).is_file() for name in TABLES):
            continue
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            sae = summary["sae"]
            line = {key: sae.get(key) for key in _KEYS}
            line |= {key: summary.get(key) for key in ("n_tokens", "n_active", "scope", "bin_edges")}
        except (ValueError, KeyError, TypeError, AttributeError) as why:
            raise HubSAEError(
                f"{path} is not the summary of a reverse index", hint="make it anew: hubsae index"
            ) from why
        line["name"] = path.parent.name
        line["id"] = line["id"] or path.parent.name
        line |= _size(path.parent / "features.parquet")
        found.append(line)
    return found


def _size(path: Path) -> dict[str, int]:
    """Length of a Parquet file and of its footer: with them a browser needs no request to find out."""
    with path.open("rb") as handle:
        length = handle.seek(-8, 2) + 8
        tail = handle.read(8)
    if tail[4:] != b"PAR1":
        raise HubSAEError(f"{path} is not a whole Parquet file", hint="make it anew: hubsae index")
    return {"features_bytes": length, "features_footer": int.from_bytes(tail[:4], "little") + 8}


def render(saes: list[dict[str, Any]], *, title: str, repo: str | None = None) -> str:
    """The page as HTML. Its policy allows the two scripts in it by their hashes and no other.

    >>> page = render([], title="</script><b>")
    >>> "<b>" in page, page.count("</script>")
    (False, 3)
    """
    site = {"title": title, "repo": repo, "saes": saes}
    # `<` and `&` leave the JSON, so nothing in it can end the element that holds it
    data = json.dumps(site, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    texts = {name: (_HERE / name).read_text(encoding="utf-8") for name in ("hyparquet.min.js", "app.js", "style.css")}
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src http: https:; base-uri 'none'; "
        f"form-action 'none'; script-src {_hash(texts['hyparquet.min.js'])} {_hash(texts['app.js'])}"
    )
    page = (_HERE / "index.html").read_text(encoding="utf-8")
    for mark, text in (
        ("policy", policy),
        ("style", texts["style.css"]),
        ("site", data),
        ("hyparquet", texts["hyparquet.min.js"]),
        ("app", texts["app.js"]),
    ):
        before, after = page.split(f"@{mark}@", 1)
        page = before + text + after
    return page


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def build(release: str | Path, *, title: str | None = None, repo: str | None = None) -> Path:
    """Write `index.html` into a release folder that has at least one reverse index; its path.

    Building again after `hubsae index` keeps the page in step with its tables.
    """
    release = Path(release)
    saes = indexes(release)
    if not saes:
        raise HubSAEError(
            f"{release} has no reverse index to show (no {FOLDER}/*/summary.json with {' and '.join(TABLES)})",
            hint=f"make one: hubsae index {release} --activations ACTS",
        )
    page = release / "index.html"
    text = render(saes, title=title or repo or release.resolve().name, repo=repo)
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        write_text_atomic(page, text)
    return page
