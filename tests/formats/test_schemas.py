"""The published JSON schemas are those of the code, and real files satisfy them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hubsae import HubSAE, SAEConfig
from hubsae.core.metadata import json_schema
from hubsae.formats import FORMATS, Release
from hubsae.formats.manifest import manifest_schema

DOCS = Path(__file__).resolve().parents[2] / "docs"
HOW = "write docs/schemas anew: json.dumps(schema(), indent=2, ensure_ascii=False) and a newline"


@pytest.mark.parametrize(("name", "schema"), [("metadata", json_schema), ("manifest", manifest_schema)])
def test_published_schema_is_current(name, schema):
    assert json.loads((DOCS / "schemas" / f"{name}.schema.json").read_text()) == schema(), HOW


def test_files_of_a_release_satisfy_the_schemas(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    release = Release.create(tmp_path, name="r", base_model="a/b", license="mit")
    for architecture in ("relu", "jumprelu", "gated"):
        release.add(HubSAE.random(SAEConfig(architecture=architecture, d_in=4, d_sae=8)), architecture)
        record = json.loads((tmp_path / architecture / "metadata.json").read_text())
        jsonschema.validate(record, json_schema())
    jsonschema.validate(json.loads((tmp_path / "config.json").read_text()), manifest_schema())


def test_every_format_has_its_row_in_the_docs():
    page = (DOCS / "formats.md").read_text()
    assert all(f"| `{name}` |" in page for name in FORMATS)
