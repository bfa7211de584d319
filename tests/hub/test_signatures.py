"""Public functions say what they take: explicit keywords, each documented; no `**options` that hides them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields

import pytest

import hubsae
from hubsae import ActivationDataset, HubSAE
from hubsae.activations.stream import open_stream
from hubsae.cli.harvest import command as harvest_verb
from hubsae.cli.push import command as push_verb
from hubsae.core.errors import ConfigError
from hubsae.formats import Overrides, read
from hubsae.hub.datasets import push_activations


def public() -> Iterator[tuple[str, Callable]]:
    """Functions that people call: those of the package, constructors of tools, methods of HubSAE, doors of datasets."""
    for name in hubsae.__all__:
        value = getattr(hubsae, name)
        if inspect.isfunction(value):
            yield name, value
    yield "saelens_converter", hubsae.saelens_converter
    for name, value in vars(HubSAE).items():
        if not name.startswith("_") and callable(getattr(HubSAE, name)) and inspect.getmodule(value) is not None:
            yield f"HubSAE.{name}", getattr(HubSAE, name)
    for name in ("open", "push_to_hub"):
        yield f"ActivationDataset.{name}", getattr(ActivationDataset, name)


PUBLIC = dict(public())


def test_the_list_is_not_empty():
    assert {"push", "pull", "list_saes", "HubSAE.from_pretrained", "HubSAE.push_to_hub", "HubSAE.splice"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_option_is_a_documented_keyword(name: str):
    text = inspect.getdoc(PUBLIC[name]) or ""
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), f"{name} hides its options"
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not parameter.empty, f"{name}({parameter.name}) has no type"
            assert re.search(rf"\b{parameter.name}\b", text), f"{name} does not say what {parameter.name} is"


@pytest.mark.parametrize("name", ["HubSAE.from_pretrained", "HubSAE.iter_pretrained", "convert"])
def test_every_choice_of_a_reader_can_be_given(name: str):
    assert not {field.name for field in fields(Overrides)} - set(inspect.signature(PUBLIC[name]).parameters)


def test_a_misspelt_option_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest: revision"):
        HubSAE.from_pretrained("me/any", reviison="v1")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="nearest: layer"):
        hubsae.list_saes("me/any", layr=6)  # pyright: ignore[reportCallIssue]


# what a function takes for itself; everything else it hands on to the one behind it, by its name
OWN = {
    "harvest": {
        "data", "out", "stage", "dtype", "scale", "validation_fraction", "split_by", "split_seed", "rank", "world_size",
        "shard_bytes", "shard_seconds", "source", "progress", "parts",
    },
    "hubsae harvest": {
        "dataset", "layers", "push", "raw", "dataset_config", "dataset_split", "streaming", "max_new_tokens",
        "temperature", "validation", "reward_model", "step_separator", "private", "as_json", "tasks", "workers",
        "executor", "executor_set",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("front", "behind", "own"),
    [
        (HubSAE.push_to_hub, hubsae.push, {"self"}),
        (hubsae.convert, read, {"source", "target", "to"}),
        (ActivationDataset.push_to_hub, push_activations, {"self"}),
        (hubsae.harvest, open_stream, OWN["harvest"]),
        (push_verb, hubsae.push, {"repo", "yes", "json"}),
        (harvest_verb, hubsae.harvest, OWN["hubsae harvest"]),
    ],
    ids=("HubSAE.push_to_hub", "convert", "ActivationDataset.push_to_hub", "harvest", "hubsae push", "hubsae harvest"),
)
def test_what_is_handed_on_has_the_same_name_behind(front: Callable, behind: Callable, own: set[str]):
    assert set(inspect.signature(front).parameters) - set(inspect.signature(behind).parameters) == own
