"""Training the cells of a grid: together as alone, resumed, spread over ranks, with cells that fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hubsae.core.errors import ConfigError
from hubsae.formats.native import read
from hubsae.recipes import sweep
from hubsae.recipes.registry import find_recipe
from hubsae.recipes.sweep import _bytes, cells_in, free_for_cells, groups_that_fit, outcomes, shares, train_cells
from hubsae.train import TrainConfig, train
from hubsae.train.data import TensorSource

RECIPE = find_recipe("grid_search")
cells, configs, settings = (RECIPE.module("cells"), RECIPE.module("configs"), RECIPE.module("settings"))
Cell, parse_id = cells.Cell, cells.parse_id
first_threshold, train_configs = configs.first_threshold, configs.train_configs
SweepSettings, TrainSettings = settings.SweepSettings, settings.TrainSettings


D = 16


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, D, generator=generator), dim=1)
    codes = (torch.rand(4096, 40, generator=generator) < 0.08) * torch.rand(4096, 40, generator=generator)
    return codes @ directions


def _configs(x: Tensor, *kinds: str, **options) -> list[TrainConfig]:
    sweep = SweepSettings(
        kinds=kinds or ("topk", "batch_topk", "jumprelu_fixed", "jumprelu_trained"),  # pyright: ignore[reportArgumentType]
        expansions=(2, 4), ks=(2, 4), thresholds=(0.2,),
    )  # fmt: skip
    settings = TrainSettings(**{"epochs": 4, "batch_size": 256, "lr": 3e-3, **options})
    return train_configs(sweep.cells(), settings, x)


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    return read(cells_in(folder).where(name)).tensors()


def test_cells_trained_together_equal_cells_trained_alone(x: Tensor, tmp_path: Path) -> None:
    configs = _configs(x)
    ended = train_cells(configs, x, tmp_path)
    assert [o.state for o in ended] == ["done"] * len(configs)
    assert {o.group for o in ended} == {len(configs)}
    for config in configs:
        alone = train(config, x, quiet=True).sae
        assert alone is not None
        for name, tensor in _weights(tmp_path, config.name).items():
            torch.testing.assert_close(tensor, alone.tensors()[name], rtol=1e-4, atol=2e-5)


def test_a_fixed_threshold_stays_and_a_trained_one_reaches_its_l0(x: Tensor, tmp_path: Path) -> None:
    configs = _configs(x, "jumprelu_fixed", "jumprelu_trained", epochs=30)
    train_cells(configs, x, tmp_path)
    for config in configs:
        sae, cell = read(cells_in(tmp_path).where(config.name)), parse_id(config.name)
        l0 = float((sae.encode(x) != 0).float().sum(1).mean())
        if cell.kind == "jumprelu_fixed":
            torch.testing.assert_close(sae.threshold, torch.full_like(sae.threshold, 0.2))
        else:
            assert l0 == pytest.approx(cell.number, rel=0.1)
            assert float(sae.threshold.std()) > 0
        assert sae.metadata.training.model_extra is not None
        assert "threshold_rule" in sae.metadata.training.model_extra


def test_a_calibrated_batchtopk_does_not_depend_on_the_batch(x: Tensor, tmp_path: Path) -> None:
    configs = _configs(x, "batch_topk")
    train_cells(configs, x, tmp_path)
    for config in configs:
        sae = read(cells_in(tmp_path).where(config.name))
        assert sae.config.threshold is not None
        whole = sae(x[:512])
        torch.testing.assert_close(torch.cat([sae(part) for part in x[:512].split(7)]), whole, rtol=1e-5, atol=1e-6)
        l0 = float((sae.encode(x) != 0).float().sum(1).mean())
        assert l0 == pytest.approx(parse_id(config.name).number, rel=0.02)


def test_a_cell_that_diverges_is_reported_and_the_others_are_untouched(x: Tensor, tmp_path: Path) -> None:
    good = _configs(x, "topk")
    bad = good[0].model_copy(update={"name": "TopK_exp2x_k3", "lr": 1e6, "unit_norm": False, "project": False})
    ended = train_cells([good[0], bad, *good[1:]], x, tmp_path / "with")
    assert [o.state for o in ended] == ["done", "failed", "done", "done", "done"]
    assert "loss" in str(ended[1].reason)
    assert not cells_in(tmp_path / "with").where(bad.name).exists()
    train_cells(good, x, tmp_path / "without")
    for config in good:
        for name, tensor in _weights(tmp_path / "with", config.name).items():
            torch.testing.assert_close(tensor, _weights(tmp_path / "without", config.name)[name], rtol=1e-4, atol=2e-5)


def test_a_cell_too_large_for_the_memory_is_reported_and_the_others_are_trained(x: Tensor, tmp_path: Path) -> None:
    good = _configs(x, "topk")
    # 1.4 petabytes for one matrix: the allocator refuses it
    huge = good[0].model_copy(update={"name": "TopK_exp1e+12x_k2", "expansion": 1e12})
    ended = train_cells([huge, *good], x, tmp_path, memory=1 << 62)
    assert [o.state for o in ended] == ["failed", *["done"] * len(good)]
    assert "out of memory" in str(ended[0].reason)
    assert sum(o.group for o in ended[1:]) < len(good) ** 2  # they were trained in halves


def test_a_cell_that_cannot_be_is_reported(x: Tensor, tmp_path: Path) -> None:
    good = _configs(x, "topk")[:1]
    wrong = good[0].model_copy(update={"name": "TopK_exp2x_k99", "k": 99})
    ended = train_cells([wrong, *good], x, tmp_path)
    assert ended[0].state == "failed" and "k=99" in str(ended[0].reason)
    assert ended[1].ok


def test_an_error_that_is_not_a_cells_own_stops_the_run(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than the data"):
        train_cells(_configs(x, "topk", batch_size=4096)[:1], x[:100], tmp_path)


def test_groups_respect_the_limit_and_keep_every_cell(x: Tensor) -> None:
    configs = _configs(x)
    sizes = {c.name: _bytes(c, D) for c in configs}
    for limit in (max(sizes.values()), 2 * max(sizes.values()), sum(sizes.values())):
        groups = groups_that_fit(configs, D, limit)
        assert sorted(n for g in groups for n in g) == sorted(sizes)
        assert all(sum(sizes[n] for n in g) <= limit for g in groups)
    assert len(groups_that_fit(configs, D, sum(sizes.values()))) == 1
    assert groups_that_fit(configs, D, 1) == [[c.name] for c in sorted(configs, key=lambda c: -sizes[c.name])]
    assert free_for_cells("cpu") > 1 << 20


def test_grouping_changes_no_result(x: Tensor, tmp_path: Path) -> None:
    configs = _configs(x, "topk", "jumprelu_trained")
    together = train_cells(configs, x, tmp_path / "one")
    limit = 2 * max(_bytes(c, D) for c in configs)
    apart = train_cells(configs, x, tmp_path / "many", memory=limit)
    assert {o.group for o in together} == {8} and max(o.group for o in apart) < 8
    for config in configs:
        for name, tensor in _weights(tmp_path / "one", config.name).items():
            torch.testing.assert_close(tensor, _weights(tmp_path / "many", config.name)[name], rtol=1e-4, atol=2e-5)


def test_ranks_get_every_cell_once_and_even_work() -> None:
    cells = [TrainConfig(name=f"{e}-{k}", expansion=e, k=k) for e in (4, 8, 16) for k in (32, 64, 128, 220)]
    for world in (1, 2, 3, 5):
        given = shares(cells, 896, world)
        assert sorted(c.name for share in given for c in share) == sorted(c.name for c in cells)
        work = [sum(c.width(896) for c in share) for share in given]
        assert max(work) - min(work) <= 16 * 896


class _Slow(TensorSource):
    """Rows that come slowly enough to be killed in the middle of."""

    def batches(self, *args, **options):
        for batch in super().batches(*args, **options):
            time.sleep(0.004)
            yield batch


def _run_slowly(x: Tensor, folder: str) -> None:
    torch.set_num_threads(1)
    train_cells(_configs(x, "topk", "batch_topk", epochs=5), _Slow(x), folder, memory=100_000)


def test_a_killed_run_keeps_finished_cells_and_continues_the_one_it_was_in(x: Tensor, tmp_path: Path) -> None:
    configs = _configs(x, "topk", "batch_topk", epochs=5)
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=_run_slowly, args=(x, str(folder)))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        begun = list(folder.glob("groups/*/state/step_*"))
        if begun and len(outcomes(folder, [c.name for c in configs])) >= 1:
            break
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = outcomes(folder, [c.name for c in configs])
    assert 0 < len(before) < len(configs)
    stamps = {o.id: cells_in(folder).where(o.id).stat().st_mtime_ns for o in before}
    plan = json.loads((folder / "plan-0-of-1.json").read_text())
    ended = train_cells(configs, _Slow(x), folder, memory=1 << 40)
    assert all(o.ok for o in ended)
    assert json.loads((folder / "plan-0-of-1.json").read_text()) == plan  # a group's state fits that group only
    assert stamps == {name: cells_in(folder).where(name).stat().st_mtime_ns for name in stamps}
    undisturbed = tmp_path / "undisturbed"
    train_cells(configs, x, undisturbed, memory=100_000)
    for config in configs:
        for name, tensor in _weights(folder, config.name).items():
            assert torch.equal(tensor, _weights(undisturbed, config.name)[name]), (config.name, name)
    assert not list(folder.glob("groups/*"))


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_the_first_threshold_gives_random_directions_the_density_asked_for(x: Tensor, density: float) -> None:
    rows = x - x.mean(0)
    threshold = first_threshold(rows, density, seed=3)
    W = torch.nn.functional.normalize(torch.randn(2000, D, generator=torch.Generator().manual_seed(9)), dim=1)
    assert float((rows @ W.T > threshold).float().mean()) == pytest.approx(density, rel=0.1)


def test_what_counts_as_out_of_memory() -> None:
    assert sweep.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert sweep.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not sweep.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not sweep.is_out_of_memory(ValueError("out of memory"))


def test_seeds_make_cells_of_their_own() -> None:
    cells = SweepSettings(kinds=("topk",), expansions=(4,), ks=(8,), seeds=(0, 1)).cells()
    assert [c.id for c in cells] == ["TopK_exp4x_k8", "TopK_exp4x_k8_s1"]
    assert cells[1] == Cell("topk", 4, 8, 1)


def test_the_first_rank_returns_when_no_other_writes_or_removes_anything(
    x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = _configs(x, "topk", epochs=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    train_cells(configs, x, tmp_path)
    # as it is between its last cell and its return: the state of its group is still there
    ended, state = tmp_path / "ended-1-of-2", tmp_path / "groups" / "its" / "state"
    ended.unlink()
    state.mkdir(parents=True)

    def last_act(seconds: float) -> None:
        shutil.rmtree(state.parent)
        ended.touch()

    monkeypatch.setattr(sweep.time, "sleep", last_act)
    monkeypatch.setenv("RANK", "0")
    assert all(outcome.ok for outcome in train_cells(configs, x, tmp_path))
    assert ended.is_file()
