"""The record survives a round trip, tolerates the future, names what is wrong; files are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubsae import HookPoint, Metadata, SAEConfig
from hubsae.core.errors import FormatError, HookError, MetadataError
from hubsae.core.extras import MissingExtraError, require
from hubsae.core.files import atomic_path, read_json, safe_join, write_csv_atomic, write_json_atomic
from hubsae.core.metadata import Metric, json_schema

CONFIG = SAEConfig(architecture="topk", d_in=8, d_sae=32, k=4)


@given(
    layer=st.integers(0, 200),
    stage=st.none() | st.text(max_size=20),
    value=st.floats(allow_nan=False, allow_infinity=False),
    note=st.dictionaries(st.text(min_size=1, max_size=5).map(lambda s: "x_" + s), st.integers(), max_size=3),
)
def test_round_trip(layer, stage, value, note):
    record = Metadata.from_dict({"config": CONFIG.model_dump(), "base_model": {"stage": stage, **note}})
    record.hook.layer = layer
    record.set_metrics([Metric(name="mse", value=value, scope="all", interval=(0.0, 1.0))])
    again = Metadata.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    assert again.metric("mse", "all") == value


def test_unknown_keys_from_a_newer_version_are_kept_and_warned_about_once():
    data = {"hubsae_format": 9, "config": CONFIG.model_dump(), "novelty": {"a": 1}, "hook": {"layer": 3, "side": "x"}}
    with pytest.warns(UserWarning, match="metadata format 9") as seen:
        record = Metadata.from_dict(data)
    assert len(seen) == 1
    assert record.to_dict()["novelty"] == {"a": 1}
    assert record.to_dict()["hook"]["side"] == "x"


def test_a_newer_config_key_that_may_change_the_numbers_is_refused():
    data = {"hubsae_format": 9, "config": {**CONFIG.model_dump(), "twist": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MetadataError, match="twist"):
            Metadata.from_dict(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "required key 'config' is missing"),
        ({"config": {"architecture": "topk", "d_in": 8}}, "'config.d_sae' is missing"),
        ({"config": {**CONFIG.model_dump(), "d_in": "wide"}}, r"config.d_in: .*found 'wide'"),
        ({"config": {**CONFIG.model_dump(), "frob": 1}}, "unknown key 'config.frob'"),
        ([], "expected an object, found list"),
    ],
)
def test_errors_name_the_key(data, says):
    with pytest.raises(MetadataError, match=says):
        Metadata.from_dict(data)


def test_a_metric_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        Metric(name="mse", value=float("nan"))


def test_the_schema_describes_every_field():
    schema = json_schema()
    assert set(schema["properties"]) == set(Metadata.model_fields)
    json.dumps(schema)


@pytest.mark.parametrize("part", ["../x", "/etc/passwd", "a/../../b", "C:/x", "a\\..\\b", "a\0b"])
def test_paths_cannot_leave_their_folder(part, tmp_path):
    with pytest.raises(FormatError, match="leaves it"):
        safe_join(tmp_path, part)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.json"
    write_json_atomic(target, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(target, {"new": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json_atomic(target, {"old": 1})
    code = (
        "import os, signal\nfrom hubsae.core.files import atomic_path\n"
        f"with atomic_path({str(target)!r}) as t:\n    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert read_json(target) == {"old": 1}


def test_csv_has_the_union_of_columns(tmp_path):
    path = write_csv_atomic(tmp_path / "r.csv", [{"a": 1}, {"b": 2, "a": 3}])
    assert path.read_text() == "a,b\n1,\n3,2\n"


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(FormatError, match=r"m\.json: expected JSON"):
        read_json(tmp_path / "m.json")
    with pytest.raises(FormatError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_a_missing_extra_names_the_install_command():
    with pytest.raises(MissingExtraError, match=r"pip install 'hubsae\[plots\]'"):
        require("no_such_module_here", extra="plots")


@pytest.mark.parametrize(
    ("text", "layer", "kind"),
    [
        ("18", 18, "resid_post"),
        ("layers.35", 35, "resid_post"),
        ("model.layers.18", 18, "resid_post"),
        ("model.layers.12.output", 12, "resid_post"),
        ("transformer.h.3.mlp", 3, "mlp_out"),
        ("gpt_neox.layers.3.attention", 3, "attn_out"),
        ("blocks.4.hook_resid_pre", 4, "resid_pre"),
        ("6.mlp_out", 6, "mlp_out"),
        ("layers.6.attn_out", 6, "attn_out"),
        ("layer_6", 6, "resid_post"),
        ("layers_7", 7, "resid_post"),
    ],
)
def test_hook_points_are_read_in_every_spelling(text, layer, kind):
    point = HookPoint.parse(text)
    assert (point.layer, point.kind) == (layer, kind)
    assert HookPoint.parse(point.name) == point
    assert HookPoint.parse(point.transformer_lens) == point


def test_an_unreadable_hook_point_lists_the_spellings():
    with pytest.raises(HookError, match=r"blocks\.18\.hook_resid_post"):
        HookPoint.parse("the middle")
