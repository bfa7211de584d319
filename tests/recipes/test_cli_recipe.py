"""`hubsae recipe`: list, show, run, copy, and what they say when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hubsae.cli.recipe import app
from hubsae.core.errors import ConfigError, NotFoundError
from hubsae.recipes.registry import copy_recipe, describe, find_recipe, list_recipes
from hubsae.recipes.run import RunError

OWN = '''"""A recipe of one's own: counts to n."""

from hubsae.core.settings import Settings
from hubsae.recipes.steps import Estimate, Step


class Config(Settings):
    n: int = 3


def steps(config):
    def count(ctx):
        (ctx.folder / "n.txt").write_text(str(config.n))
        return {"lines": [f"counted to {config.n}"]}

    return [Step("report", count, {"n": config.n}, estimate=Estimate("counting", disk=2_000_000, memory=3_000_000_000))]
'''


def invoke(*args: str):
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "counting"
    folder.mkdir()
    (folder / "recipe.py").write_text(OWN)
    (folder / "tiny.yaml").write_text("n: 4\n")
    (folder / "README.md").write_text("# Counting\n")
    return folder


def test_list_names_recipes_profiles_and_configs():
    rows = {row["name"]: row for row in json.loads(invoke("list", "--json").output)}
    assert rows["rl_chain"]["profiles"] == ["demo", "fast", "full", "small", "tiny"]
    assert rows["rl_chain"]["configs"] == ["control", "flexible", "kl0p025", "shuffled", "strict"]
    assert "drift" in rows["rl_chain"]["summary"]
    assert "rl_chain" in invoke("list").output


def test_every_recipe_has_a_readme_a_summary_and_a_config_that_is_valid():
    for recipe in list_recipes():
        assert recipe.summary and (recipe.folder / "README.md").stat().st_size > 500
        for profile in recipe.profiles:
            for variant in recipe.configs or [None]:
                recipe.config(profile, variant)


def test_show_prints_the_readme_or_the_complete_config():
    assert "What was claimed" in invoke("show", "rl_chain").output
    config = invoke("show", "rl_chain", "--profile", "full", "--config", "flexible").output
    assert "kl_coef: 0.005" in config and "save_steps:" in config


def test_a_folder_with_a_recipe_runs_and_a_second_run_skips(own, tmp_path):
    out = str(tmp_path / "run")
    first = invoke("run", str(own), "--out", out, "n=5")
    assert "counted to 5" in first.output and "report: done" in first.output
    assert "unchanged, skipped" in invoke("run", str(own), "--out", out, "n=5").output
    again = json.loads(invoke("run", str(own), "--out", out, "--json").stdout)
    assert again["steps"][0]["ran"] and (tmp_path / "run/report/n.txt").read_text() == "4"


def test_a_dry_run_shows_sizes_and_writes_nothing(own, tmp_path):
    shown = invoke("run", str(own), "--out", str(tmp_path / "run"), "--dry-run").output
    assert "counting" in shown and "3.0 GB" in shown and "Nothing was run" in shown
    assert not (tmp_path / "run").exists()


def test_copy_makes_a_recipe_to_edit_and_never_overwrites(tmp_path):
    copy_recipe("rl_chain", tmp_path / "mine")
    assert find_recipe(str(tmp_path / "mine")).configs == find_recipe("rl_chain").configs
    with pytest.raises(RunError, match="not empty"):
        copy_recipe("rl_chain", tmp_path / "mine")
    assert "copied" in invoke("copy", "rl_chain", str(tmp_path / "again")).output or (tmp_path / "again").is_dir()


def test_wrong_names_say_what_there_is():
    with pytest.raises(NotFoundError, match="rl_chain"):
        find_recipe("rl_chian")
    with pytest.raises(ConfigError, match="strict"):
        find_recipe("rl_chain").config("tiny")
    with pytest.raises(NotFoundError, match="strict"):
        find_recipe("rl_chain").config("tiny", "strikt")
    with pytest.raises(NotFoundError, match="demo, fast, full, small, tiny"):
        describe("rl_chain", profile="huge", variant="strict")
