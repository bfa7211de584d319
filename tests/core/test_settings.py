"""Recipe config: layers, overrides and errors that name the key."""

from __future__ import annotations

import pytest
import yaml

from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.settings import Settings, compose, key_paths, parse_override, read_yaml, to_yaml


class Train(Settings):
    lr: float = 1e-3
    layers: tuple[int, ...] = (1, 2)


class Config(Settings):
    seed: int = 0
    train: Train = Train()
    again: Train | None = None


def test_later_layers_win_and_overrides_win_over_all():
    config = compose(
        Config, [{"seed": 1, "train": {"lr": 2, "layers": [3]}}, {"train": {"lr": "5e-4"}}], ["train.layers=[0, 23]"]
    )
    assert config == Config(seed=1, train=Train(lr=5e-4, layers=(0, 23)))


def test_overrides_reach_optional_sections_and_read_yaml_values():
    assert compose(Config, [], ["again.lr=1e-4"]).again == Train(lr=1e-4)
    assert parse_override("a.b=null") == ("a.b", None)
    assert parse_override("a= x=y ") == ("a", "x=y")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["train.rate=1"], "(?s)no key 'train.rate'.*train.lr"),
        (["seed"], "not an override"),
        (["seed=many"], "seed: .*found 'many'"),
        (["train.layers=[1"], "not YAML"),
    ],
)
def test_wrong_overrides_name_the_key_and_the_nearest(overrides: list[str], text: str):
    with pytest.raises(ConfigError, match=text):
        compose(Config, [], overrides)


def test_an_unknown_key_in_a_file_is_refused():
    with pytest.raises(ConfigError, match=r"train\.Lr: no such key \(nearest: train\.lr"):
        compose(Config, [{"train": {"Lr": 1}}])


def test_to_yaml_gives_back_the_same_config():
    config = Config(seed=4, train=Train(lr=1e-5))
    assert Config.model_validate(yaml.safe_load(to_yaml(config))) == config


def test_key_paths_cover_nested_and_optional_sections():
    assert list(key_paths(Config)) == ["seed", "train", "train.lr", "train.layers", "again", "again.lr", "again.layers"]


def test_files_that_are_not_mappings_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n")
    (tmp_path / "b.yaml").write_text("a: [\n")
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(FormatError, match="a mapping"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(FormatError, match="YAML"):
        read_yaml(tmp_path / "b.yaml")
    assert read_yaml(tmp_path / "c.yaml") == {}
