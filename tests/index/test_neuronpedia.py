"""The export for Neuronpedia, read back by the fields and types of its own records."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hubsae.core.errors import HubSAEError
from hubsae.index.neuronpedia import Names, export

from . import synthetic

TEXT, NUMBER, WHOLE, TEXTS, NUMBERS, WHOLES = str, (int, float), int, [str], [(int, float)], [int]
# name -> (type, whether it must be there); a record there has these fields and no other
RECORDS = {
    "activation": {
        **dict.fromkeys(("id", "index", "layer", "modelId", "creatorId"), (TEXT, True)),
        **dict.fromkeys(("maxValue", "minValue"), (NUMBER, True)),
        "tokens": (TEXTS, True), "values": (NUMBERS, True), "maxValueTokenIndex": (WHOLE, True),
        **dict.fromkeys(("dataSource", "dataIndex", "logitContributions", "createdAt"), (TEXT, False)),
        **dict.fromkeys(("binMin", "binMax", "binContains", "dfaMaxValue"), (NUMBER, False)),
        **dict.fromkeys(("dfaValues", "lossValues", "zValues"), (NUMBERS, False)),
        **dict.fromkeys(("qualifyingTokenIndex", "dfaTargetIndex"), (WHOLE, False)),
    },
    "feature": {
        **dict.fromkeys(("modelId", "layer", "index"), (TEXT, True)),
        **dict.fromkeys(("creatorId", "createdAt", "vectorLabel", "hookName", "sourceSetName"), (TEXT, False)),
        **dict.fromkeys(("maxActApprox", "frac_nonzero", "vectorDefaultSteerStrength"), (NUMBER, False)),
        "hasVector": (bool, False), "topkCosSimIndices": (WHOLES, False),
        **dict.fromkeys(("pos_str", "neg_str"), (TEXTS, False)),
        **dict.fromkeys(
            ("vector", "topkCosSimValues", "pos_values", "neg_values", "freq_hist_data_bar_heights",
             "freq_hist_data_bar_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
            (NUMBERS, False),
        ),
    },
    "release": {
        **dict.fromkeys(("name", "description", "creatorName", "creatorId"), (TEXT, True)),
        **dict.fromkeys(("visibility", "descriptionShort", "creatorEmail", "creatorNameShort"), (TEXT, False)),
        "createdAt": (TEXT, False), "urls": (TEXTS, False),
    },
    "model": {
        **dict.fromkeys(("id", "creatorId"), (TEXT, True)), "instruct": (bool, True),
        **dict.fromkeys(("displayNameShort", "displayName", "tlensId", "visibility", "owner"), (TEXT, False)),
        **dict.fromkeys(("createdAt", "updatedAt"), (TEXT, False)),
        **dict.fromkeys(("dimension", "layers", "neuronsPerLayer"), (WHOLE, False)),
    },
    "sourceset": {
        **dict.fromkeys(("modelId", "name", "creatorId"), (TEXT, True)), "urls": (TEXTS, False),
        **dict.fromkeys(("visibility", "description", "type", "creatorName", "releaseName"), (TEXT, False)),
        "createdAt": (TEXT, False),
    },
    "source": {
        **dict.fromkeys(("id", "modelId", "setName", "creatorId"), (TEXT, True)),
        **dict.fromkeys(("saelensSaeId", "hfRepoId", "hfFolderId", "visibility", "dataset", "notes"), (TEXT, False)),
        "createdAt": (TEXT, False),
    },
}  # fmt: skip
NAMES = Names("qwen3-8b", "k64", "my-saes", "me", "user1", repo="me/my-saes")
WHEN = datetime(2026, 1, 2, tzinfo=UTC)


def check(kind: str, record: dict) -> dict:
    fields = RECORDS[kind]
    assert set(record) <= set(fields), set(record) - set(fields)
    assert {name for name, (_, needed) in fields.items() if needed} <= set(record)
    for name, value in record.items():
        wanted, needed = fields[name]
        if value is None:
            assert not needed, name
        elif isinstance(wanted, list):
            assert isinstance(value, list) and all(isinstance(one, wanted[0]) for one in value), name
        else:
            assert isinstance(value, wanted), name
    return record


def lines(path: Path) -> list[dict]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("release"), d_sae=900, active=500, examples=1700)


@pytest.fixture(scope="module")
def rows(index) -> dict[int, dict]:
    table = pq.read_table(index / "features.parquet").to_pylist()
    return {row["feature"]: row for row in table if row["count"]}


def test_the_bulk_folder_holds_every_feature_that_fires_and_every_example(index, rows, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(900, 8)).astype(np.float32)
    done = export(index, tmp_path, NAMES, vectors=vectors, created=WHEN)
    assert done.folder == tmp_path / "qwen3-8b" / "18-k64"
    for kind in ("release", "model", "sourceset", "source"):
        check(kind, *lines(done.folder / f"{kind}.jsonl"))
    features: dict[int, dict] = {}
    activations: dict[int, list[dict]] = {}
    for path in sorted((done.folder / "features").iterdir()):
        features |= {int(one["index"]): check("feature", one) for one in lines(path)}
    for path in sorted((done.folder / "activations").iterdir()):
        for one in lines(path):
            activations.setdefault(int(one["index"]), []).append(check("activation", one))
    assert set(features) == set(activations) == set(rows)
    assert (done.features, done.dead) == (len(rows), 900 - len(rows))
    assert done.activations == sum(map(len, activations.values())) == sum(len(row["examples"]) for row in rows.values())
    for number, row in rows.items():
        one = features[number]
        assert one["frac_nonzero"] == row["density"] and one["maxActApprox"] == row["max"]
        assert sum(one["freq_hist_data_bar_heights"]) == sum(row["histogram"])
        assert one["pos_str"] == [logit["token"] for logit in row["top_logits"]]
        np.testing.assert_array_equal(np.array(one["vector"], np.float32), vectors[number])
        for sent, example in zip(activations[number], row["examples"], strict=True):
            assert sent["tokens"] == example["tokens"] and sent["values"] == example["values"]
            assert sent["values"][sent["maxValueTokenIndex"]] == max(example["values"]) == sent["maxValue"]
            banded = example["kind"] == "sample"
            assert (
                (sent["binContains"] == 0.25 and 0 <= sent["binMin"] < sent["binMax"])
                if banded
                else sent["binContains"] == -1
            )
    ids = [one["id"] for some in activations.values() for one in some]
    assert len(set(ids)) == len(ids)


def test_upload_batches_keep_the_limits_of_the_call(index, rows, tmp_path):
    done = export(index, tmp_path, NAMES, created=WHEN)
    bodies = [json.loads((done.folder / "upload" / f"batch-{n}.json").read_text()) for n in range(done.uploads)]
    assert [len(body["features"]) for body in bodies[:-1]] == [128] * (done.uploads - 1)
    sent = [feature for body in bodies for feature in body["features"]]
    assert [one["index"] for one in sent] == sorted(rows)
    for body in bodies:
        assert set(body) == {"modelId", "source", "features"} and body["source"] == "18-k64"
    for one in sent:
        assert set(one) == {"index", "density", "topLogits", "bottomLogits", "activations"} and one["activations"]
        assert len(one["topLogits"]) <= 20 and all(set(logit) == {"token", "value"} for logit in one["topLogits"])
        for activation in one["activations"]:
            assert 1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024


def test_the_same_index_gives_the_same_bytes(index, tmp_path):
    one, two = (export(index, tmp_path / name, NAMES, created=WHEN).folder for name in "ab")
    files = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert (one / path).read_bytes() == (two / path).read_bytes(), path


def test_what_cannot_be_exported_is_refused(index, tmp_path):
    with pytest.raises(HubSAEError, match="not a reverse index"):
        export(tmp_path, tmp_path / "out", NAMES)
    with pytest.raises(HubSAEError, match="model of an export"):
        Names("../x", "s", "r", "", "")
    export(index, tmp_path / "out", NAMES)
    with pytest.raises(HubSAEError, match="not empty"):
        export(index, tmp_path / "out", NAMES)
