"""Finding, loading, copying and running recipes: one folder per recipe.

recipes/<name>/recipe.py       docstring, `Config`, `steps(config) -> list[Step]`
recipes/<name>/*.py            what only this recipe needs; `from .plots import ...` among themselves
recipes/<name>/tiny.yaml       a profile; full.yaml another
recipes/<name>/configs/*.yaml  variants: keys under `all`, and under a profile's name for that profile only
recipes/<name>/README.md       what was claimed, what is measured
recipes/<name>/published*.csv  the numbers to compare with

A folder is loaded as a package of its own, named after what its files say: a recipe and its edited copy can be loaded
side by side, and an edit is seen at once.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hubsae.core.bundled import bundled
from hubsae.core.errors import ConfigError, FormatError, NotFoundError, nearest
from hubsae.core.settings import Settings, compose, read_yaml, to_yaml
from hubsae.recipes.run import RunError, RunFolder, StepEvent, StepOutcome
from hubsae.recipes.steps import Step


@dataclass(frozen=True)
class Recipe:
    """A recipe folder.

    >>> recipe = find_recipe("rl_chain")
    >>> recipe.profiles
    ['demo', 'fast', 'full', 'small', 'tiny']
    """

    name: str
    folder: Path

    @property
    def summary(self) -> str:
        """The first line of the recipe's docstring, read without importing it."""
        tree = ast.parse((self.folder / "recipe.py").read_text(encoding="utf-8"))
        return (ast.get_docstring(tree) or "").partition("\n")[0]

    @property
    def profiles(self) -> list[str]:
        """Profile names, from the YAML files beside `recipe.py`."""
        return sorted(path.stem for path in self.folder.glob("*.yaml"))

    @property
    def configs(self) -> list[str]:
        """Variant names, from `configs/`; empty where the recipe has one form only."""
        return sorted(path.stem for path in (self.folder / "configs").glob("*.yaml"))

    def module(self, name: str = "recipe") -> ModuleType:
        """One of the recipe's files as a module.

        >>> find_recipe("grid_search").module("cells").Cell("topk", 8, 64).id
        'TopK_exp8x_k64'
        """
        package = self._package()
        if not (self.folder / f"{name}.py").is_file():
            raise NotFoundError(f"recipe {self.name} has no {name}.py in {self.folder}")
        module = importlib.import_module(f"{package}.{name}")
        for needed in ("Config", "steps") if name == "recipe" else ():
            if not hasattr(module, needed):
                raise FormatError(self.folder / "recipe.py", f"a recipe that defines {needed}", "none")
        return module

    def _package(self) -> str:
        """The name under which the folder is a package; another one when a file in it changes."""
        digest = hashlib.sha256(str(self.folder.resolve()).encode())
        for path in sorted(self.folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
        name = f"hubsae_recipe_{re.sub('[^a-zA-Z0-9]', '_', self.name)}_{digest.hexdigest()[:12]}"
        if name not in sys.modules:
            package = ModuleType(name, f"The recipe in {self.folder}.")
            package.__path__ = [str(self.folder)]
            sys.modules[name] = package
            importlib.invalidate_caches()
        return name

    def config(self, profile: str = "tiny", variant: str | None = None, overrides: Sequence[str] = ()) -> Settings:
        """The validated config of a profile and a variant, with `key.path=value` overrides."""
        return compose(self.module().Config, self._layers(profile, variant), overrides)

    def _layers(self, profile: str, variant: str | None) -> list[dict[str, Any]]:
        if profile not in self.profiles:
            raise NotFoundError(
                f"recipe {self.name} has no profile {profile!r}", hint=f"profiles: {', '.join(self.profiles)}"
            )
        layers = [read_yaml(self.folder / f"{profile}.yaml")]
        if not self.configs:
            if variant is not None:
                raise NotFoundError(f"recipe {self.name} has no configs to choose from, so no {variant!r}")
            return layers
        if variant is None:
            raise ConfigError(
                f"recipe {self.name} comes in several configs", hint=f"choose with --config: {', '.join(self.configs)}"
            )
        if variant not in self.configs:
            near = nearest(variant, self.configs)
            raise NotFoundError(f"recipe {self.name} has no config {variant!r}", hint=f"nearest: {near}")
        path = self.folder / "configs" / f"{variant}.yaml"
        parts = read_yaml(path)
        unknown = set(parts) - {"all", *self.profiles}
        if unknown:
            raise FormatError(path, f"sections all, {', '.join(self.profiles)}", f"{', '.join(sorted(unknown))}")
        return [*layers, parts.get("all") or {}, parts.get(profile) or {}]


@dataclass(frozen=True)
class PreparedRun:
    """A recipe with its config and the folder it will run in."""

    recipe: Recipe
    profile: str
    config: Settings
    steps: list[Step]
    run: RunFolder

    def execute(self) -> list[StepOutcome]:
        """Run what is not finished."""
        from hubsae.recipes.standard import surroundings

        self.run.describe(self.recipe.name, self.profile, self.config)
        # a recipe may say how it computes: threads for small models, a fixed product for bits that are the same again
        chosen = {name: getattr(self.config, name) for name in ("threads", "matmul") if hasattr(self.config, name)}
        with surroundings(**chosen):
            return self.run.execute(self.steps)


def list_recipes() -> list[Recipe]:
    """Every recipe that comes with hubsae.

    >>> "rl_chain" in [recipe.name for recipe in list_recipes()]
    True
    """
    return [Recipe(path.parent.name, path.parent) for path in sorted(bundled("recipes").glob("*/recipe.py"))]


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or a folder of one's own that holds a `recipe.py`."""
    folder = Path(name)
    if (folder / "recipe.py").is_file():
        return Recipe(folder.resolve().name, folder.resolve())
    known = {recipe.name: recipe for recipe in list_recipes()}
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise NotFoundError(
            f"no recipe {name!r}, and no folder of that name with a recipe.py",
            hint=f"recipes: {nearest(wanted, known)}",
        )
    return known[wanted]


def prepare(
    name: str,
    *,
    profile: str = "tiny",
    variant: str | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    notify: Callable[[StepEvent], None] | None = None,
    show: bool | None = False,
) -> PreparedRun:
    """Make a recipe ready to run; nothing is written yet.

    >>> prepared = prepare("rl_chain", variant="strict", overrides=["seed=1"])
    >>> prepared.config.seed
    1
    """
    recipe = find_recipe(name)
    config = recipe.config(profile, variant, overrides)
    folder = Path(out) if out is not None else default_folder(recipe, profile, variant)
    run = RunFolder(folder, notify=notify, show=show)
    return PreparedRun(recipe, profile, config, recipe.module().steps(config), run)


def default_folder(recipe: Recipe, profile: str, variant: str | None) -> Path:
    """`runs/<recipe>-<config>-<profile>` below the working folder."""
    return Path("runs") / "-".join(part for part in (recipe.name, variant, profile) if part)


def copy_recipe(name: str, to: str | Path) -> Path:
    """Copy a recipe's folder, to be edited and run with `hubsae recipe run ./folder`."""
    recipe, target = find_recipe(name), Path(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} exists and is not empty", hint="choose a new folder")
    shutil.copytree(recipe.folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def describe(name: str, profile: str | None = None, variant: str | None = None) -> str:
    """The README of a recipe, or the complete config of one profile and variant as YAML."""
    recipe = find_recipe(name)
    if profile is None and variant is None:
        return (recipe.folder / "README.md").read_text(encoding="utf-8")
    return to_yaml(recipe.config(profile or "tiny", variant))
