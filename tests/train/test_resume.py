"""A run that was stopped, by Ctrl-C or by kill -9 at any moment, ends with the bytes of one that was not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from kills import in_a_process, kill_and_flip
from safetensors.torch import load_file

from hubsae.activations import ActivationDataset
from hubsae.core.errors import FormatError, TrainingInterrupted
from hubsae.train import AuxConfig, DeadConfig, ResampleConfig, TrainConfig, checkpoint, train
from hubsae.train.trainer import Run

CONFIG = TrainConfig(
    architecture="batch_topk",
    d_sae=96,
    k=4,
    batch_size=128,
    epochs=6,
    lr=2e-3,
    normalize="mean_std",
    clip=1.0,
    aux=AuxConfig(k=8),
    dead=DeadConfig(rule="frequency", frequency=5e-3, resample=ResampleConfig(every_epochs=2, tokens=256)),
    val_fraction=0.125,
    keep_best=2,
    checkpoint_every=7,
    log_every=5,
)


def tokens() -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(2048, 16, generator=g) @ torch.randn(16, 16, generator=g) + 1


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


def bytes_of(run: Path) -> dict[str, bytes]:
    """What must be equal: the exported SAE's tensors, the best checkpoints, the final state."""
    files = [*run.glob("sae/*.safetensors"), *run.glob("best/*/*"), *run.glob("state/*/*.safetensors")]
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(files)}


def lines_of(run: Path) -> list[str]:
    import json

    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [str({k: v for k, v in line.items() if k != "tokens_per_s"}) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    train(CONFIG, tokens(), out=path)
    return path


@pytest.mark.parametrize("at", [1, 7, 13, 14, 15, 28, 41, 83])
@pytest.mark.parametrize("where", ["before", "after"])
def test_stopped_inside_any_step_and_resumed_ends_with_the_same_bytes(at, where, whole, tmp_path, monkeypatch):
    real = Run._train

    def dies(self, x):
        if self.step == at and where == "before":
            raise Killed
        real(self, x)
        if self.step == at and where == "after":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", dies)
        with pytest.raises(Killed):
            train(CONFIG, tokens(), out=tmp_path)
    train(CONFIG, tokens(), out=tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole)
    assert lines_of(tmp_path) == lines_of(whole)


def test_resume_from_a_dataset_in_files_is_bit_identical(tmp_path, monkeypatch):
    rows = tokens()
    c = CONFIG.model_copy(update={"val_fraction": 0.0, "epochs": 3.0})

    def data():
        return ActivationDataset.from_tensor(rows)

    expected = train(c, data(), val=rows[:256]).sae
    real = Run._train

    def dies(self, x):
        real(self, x)
        if self.step == 25:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", dies)
        with pytest.raises(Killed):
            train(c, data(), out=tmp_path, val=rows[:256])
    found = train(c, data(), out=tmp_path, val=rows[:256]).sae
    assert expected is not None and found is not None
    assert torch.equal(expected.W_enc, found.W_enc) and torch.equal(expected.W_dec, found.W_dec)


def test_a_state_cut_short_while_it_was_written_is_not_taken_for_one(tmp_path, whole):
    run = Run([CONFIG], tokens(), out=tmp_path)
    folder = tmp_path / "state"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writing_abc").mkdir()
    (folder / ".writing_abc" / "cell0.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path / "state") is None and not (folder / ".writing_abc").exists()
    assert run.step == 0


def test_two_runs_with_one_seed_are_equal_and_with_another_differ(whole):
    again = train(CONFIG, tokens()).sae
    other = train(CONFIG.model_copy(update={"seed": 1}), tokens()).sae
    first = load_file(whole / "sae" / "sae_weights.safetensors")
    assert again is not None and other is not None
    assert torch.equal(again.W_enc, first["W_enc"]) and not torch.equal(other.W_enc, first["W_enc"])


CHILD = """
    import sys, torch
    sys.path[:0] = {tests!r}
    torch.set_num_threads(1)
    from test_resume import CONFIG, tokens
    from hubsae.train import train
    print("ready", flush=True)
    train(CONFIG, tokens(), out={out!r}, quiet=True)
"""


def child(out: Path) -> subprocess.Popen:
    code = textwrap.dedent(CHILD).format(tests=[str(folder) for folder in Path(__file__).parents[:2]], out=str(out))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path, whole, monkeypatch):
    real = Run._train

    def interrupted(self, x):
        real(self, x)
        if self.step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", interrupted)
        with pytest.raises(Exception, match="interrupted after step 20 of 84") as caught:
            train(CONFIG, tokens(), out=tmp_path)
    assert "start the same command again" in str(caught.value)
    state = checkpoint.latest(tmp_path / "state")
    assert state is not None and state.name == "step_00000020"
    train(CONFIG, tokens(), out=tmp_path)
    final = [name for name in bytes_of(whole) if name.startswith(("sae/", "best/"))]
    assert [bytes_of(tmp_path)[n] for n in final] == [bytes_of(whole)[n] for n in final]


def test_ctrl_c_behind_the_last_step_is_not_swallowed(tmp_path, whole, monkeypatch):
    real = Run._finish

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", interrupted)
        with pytest.raises(TrainingInterrupted, match="when training was done"):
            train(CONFIG, tokens(), out=tmp_path)
    final = [name for name in bytes_of(whole) if name.startswith(("sae/", "best/"))]
    assert final and [bytes_of(tmp_path)[n] for n in final] == [bytes_of(whole)[n] for n in final]
    assert train(CONFIG, tokens(), out=tmp_path).sae is not None


def stopped_at(step: int, out: Path, monkeypatch) -> None:
    real = Run._train

    def dies(self, x):
        if self.step == step:
            raise Killed
        real(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", dies)
        with pytest.raises(Killed):
            train(CONFIG, tokens(), out=out)


@pytest.mark.parametrize("name", ["cell0.safetensors", "state.json"])
def test_a_damaged_state_is_named_and_the_one_before_it_taken(name, tmp_path, whole, monkeypatch, capfd):
    stopped_at(40, tmp_path, monkeypatch)
    assert [p.name for p in checkpoint.states(tmp_path / "state")] == ["step_00000028", "step_00000035"]
    file = tmp_path / "state" / "step_00000035" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert train(CONFIG, tokens(), out=tmp_path).sae is not None
    assert f"step_00000035 is damaged, so it is not used: {file}" in capfd.readouterr().err.replace("\n", "")
    assert bytes_of(tmp_path) == bytes_of(whole)
    assert lines_of(tmp_path) == lines_of(whole)


def test_the_damaged_record_of_a_kept_checkpoint_is_written_anew(tmp_path, whole, monkeypatch):
    stopped_at(80, tmp_path, monkeypatch)
    record = sorted(tmp_path.glob("best/*/*.json"))[0]
    record.write_text(record.read_text().replace("\n", " ", 1))
    record.with_name(sorted(tmp_path.glob("best/*/*.json"))[-1].name).write_text("{")
    assert train(CONFIG, tokens(), out=tmp_path).sae is not None
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_a_run_killed_at_its_very_end_is_tidied_by_the_next_call(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    run = tmp_path / "run"
    best = sorted(run.glob("best/*/*.safetensors"))[0]
    for suffix in (".safetensors", ".json"):  # a kept checkpoint that was not removed yet
        shutil.copy(best.with_suffix(suffix), best.with_name(f"step_00000007{suffix}"))
    weights = run / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    train(CONFIG, tokens(), out=run)
    assert bytes_of(run) == bytes_of(whole)


def test_without_a_whole_state_the_error_names_the_file_and_fresh(tmp_path, monkeypatch):
    stopped_at(40, tmp_path, monkeypatch)
    for state in checkpoint.states(tmp_path / "state"):
        (state / "cell0.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"cell0.safetensors.*another or none\n.*--fresh"):
        train(CONFIG, tokens(), out=tmp_path)
    assert train(CONFIG, tokens(), out=tmp_path, resume=False).sae is not None


def test_sigterm_saves_like_ctrl_c(tmp_path, whole):
    process = child(tmp_path)
    assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
    while not checkpoint.states(tmp_path / "state") and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    if b"interrupted" in errors:  # else it was done before
        state = checkpoint.latest(tmp_path / "state")
        assert state is not None and f"after step {int(state.name[5:])} of 84".encode() in errors
    train(CONFIG, tokens(), out=tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole)


def trainings(folder: Path, whole: Path, kills: int) -> dict[str, int]:
    def same_bytes(out: Path) -> None:
        assert bytes_of(out) == bytes_of(whole), out

    return kill_and_flip(
        lambda out: train(CONFIG, tokens(), out=out, quiet=True),
        same_bytes, folder, kills=kills, longest=0.9, share=0.6, seed=5,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_with_a_random_bit_flipped_before_each_resume(tmp_path, whole):
    """Every run ends with the bytes of an undisturbed one, or with an error of ours that says what is damaged."""
    kills = int(os.environ.get("HUBSAE_KILLS", "300"))
    outcomes = in_a_process(__file__, f"trainings({tmp_path!r}, {whole!r}, {kills})")
    assert outcomes["whole"] > 0 and outcomes["kills"] >= kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kill_minus_nine_at_a_random_moment(seed, tmp_path, whole):
    rng = random.Random(seed)
    process = child(tmp_path)
    assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
    time.sleep(rng.uniform(0.0, 0.8))
    process.kill()
    process.wait()
    finished = child(tmp_path)
    _, errors = finished.communicate(timeout=300)
    assert finished.returncode == 0, errors.decode()
    assert bytes_of(tmp_path) == bytes_of(whole)
