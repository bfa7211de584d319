"""The tiny world: the same from the same seed, learns, loads like any model, survives kills and rivals."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hubsae.core.errors import ConfigError, NotFoundError
from hubsae.core.files import sha256_file
from hubsae.recipes.tiny import tiny_world
from hubsae.recipes.tiny_problems import STYLES, draw_style, make_problems, styled_answer

SHORT = {"steps": 6, "keep_steps": (0, 6), "train_problems": 200, "test_problems": 20}


def last_number(text: str) -> str | None:
    return (re.findall(r"\d+", text) or [None])[-1]


def test_problems_are_distinct_solvable_and_the_same_for_a_seed():
    problems = make_problems(500, seed=3)
    assert problems == make_problems(500, seed=3)
    assert problems != make_problems(500, seed=4)
    assert len({p.question for p in problems}) == 500
    for p in problems:
        numbers = [int(n) for n in re.findall(r"\d+", p.question)]
        signs = [-1 if word in ("gives", "loses") else 1 for word in re.findall(r"gives|gets|loses|finds", p.question)]
        assert numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:], strict=True)) == int(p.gold)
        for line in p.working.split("\n"):
            left, right = line.split("=")
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()  # type: ignore[union-attr]
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(right) >= 0


def test_only_the_hash_style_states_the_number_strictly_and_the_distractor_hides_it():
    for p in make_problems(50, seed=1):
        for style in STYLES:
            text = styled_answer(p, style)
            assert (f"#### {p.gold}" in text) == (style == "hash")
            assert (last_number(text) == p.gold) == (style != "distractor" or p.gold == "2")
    rng = random.Random(0)
    drawn = [draw_style(rng) for _ in range(4000)]
    for style, share in STYLES.items():
        assert abs(drawn.count(style) / 4000 - share) < 0.03


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path):
    a = tiny_world("quick", cache=tmp_path / "a", **SHORT)
    b = tiny_world("quick", cache=tmp_path / "b", **SHORT)
    c = tiny_world("quick", seed=1, cache=tmp_path / "a", **SHORT)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert sha256_file(a.model_path / name) == sha256_file(b.model_path / name)
    assert sha256_file(a.model_path / "model.safetensors") != sha256_file(c.model_path / "model.safetensors")


def test_building_leaves_the_callers_random_state_and_threads_alone(tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    tiny_world("quick", cache=tmp_path, **SHORT)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_second_call_opens_the_cache(tmp_path: Path):
    calls: list[int] = []
    first = tiny_world("quick", cache=tmp_path, progress=lambda done, total, text: calls.append(done), **SHORT)
    assert calls == [1, 2, 3, 4, 5, 6]
    again = tiny_world("quick", cache=tmp_path, progress=lambda done, total, text: calls.append(done), **SHORT)
    assert len(calls) == 6 and again.folder == first.folder
    assert again.test_problems == first.test_problems


def test_held_out_problems_are_not_trained_on(quick_world):
    train = {p.question for p in quick_world.train_problems}
    assert train.isdisjoint({p.question for p in quick_world.test_problems})


def test_the_warm_up_learns(quick_world):
    rows = [line.split(",") for line in (quick_world.folder / "warmup.csv").read_text().split()[1:]]
    losses = [float(loss) for _, loss in rows]
    assert losses[-1] < 0.25 * losses[0]


def test_the_finished_model_answers_better_than_an_early_stage(quick_world):
    def right(stage: str) -> float:
        tokenizer, problems = quick_world.tokenizer, quick_world.test_problems[:100]
        batch = tokenizer.pad({"input_ids": [quick_world.prompt_ids(p) for p in problems]}, return_tensors="pt")
        out = quick_world.load_stage(stage).generate(**batch, max_new_tokens=32, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return (
            sum(p.gold in re.findall(r"\d+", t.partition("\n")[2]) for p, t in zip(problems, texts, strict=True)) / 100
        )

    first, last = list(quick_world.stages)[1], list(quick_world.stages)[-1]
    assert right(last) > right(first) + 0.2


def test_the_checkpoint_is_an_ordinary_transformers_folder(quick_world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(quick_world.model_path)
    tokenizer = AutoTokenizer.from_pretrained(quick_world.model_path)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.num_hidden_layers == 4
    assert model.config.tie_word_embeddings
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_rendered_prompt_is_a_token_prefix_of_the_whole_conversation(quick_world):
    tokenizer = quick_world.tokenizer
    for problem in quick_world.test_problems[:50]:
        for style in STYLES:
            answer = styled_answer(problem, style)
            messages = [*quick_world.messages(problem), {"role": "assistant", "content": answer}]
            whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
            prompt = quick_world.prompt_ids(problem)
            assert whole.input_ids[: len(prompt)] == prompt
            assert tokenizer.decode(whole.input_ids[len(prompt) :]) == answer + "<|im_end|>\n"


def test_digits_are_single_tokens(quick_world):
    ids = quick_world.tokenizer("1234567890", add_special_tokens=False).input_ids
    assert len(ids) == 10


def test_datasets_reads_the_written_dataset_as_gsm8k(quick_world, tmp_path: Path):
    from datasets import load_dataset

    folder = quick_world.rows_folder("problems", tmp_path / "gsm8k-tiny")
    data = load_dataset(str(folder), "main", cache_dir=str(tmp_path / "cache"))
    assert data["train"].column_names == ["question", "answer"]
    assert len(data["train"]) == 1500 and len(data["test"]) == 256
    assert data["test"][0]["answer"].endswith(f"\n#### {quick_world.test_problems[0].gold}")


def test_wrong_names_say_what_there_is(quick_world):
    with pytest.raises(ConfigError, match="quick"):
        tiny_world("large")
    with pytest.raises(NotFoundError, match="sft_step200"):
        quick_world.load_stage("sft_step20")


BUILD = """
import sys
from hubsae.recipes.tiny import tiny_world
calls = []
world = tiny_world("quick", cache=sys.argv[1], steps=int(sys.argv[2]), keep_steps=(0,), train_problems=200,
                   test_problems=20, progress=lambda done, total, text: (calls.append(done), print(done, flush=True)))
print("built" if calls else "opened", world.folder)
"""


def start_build(cache: Path, steps: int) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(cache), str(steps)], stdout=subprocess.PIPE, text=True, env=env
    )


def test_two_processes_at_once_build_once(tmp_path: Path):
    rivals = [start_build(tmp_path, 5) for _ in range(2)]
    last_lines = [rival.communicate(timeout=300)[0].strip().split("\n")[-1] for rival in rivals]
    assert sorted(line.split()[0] for line in last_lines) == ["built", "opened"]
    assert len({line.split()[1] for line in last_lines}) == 1


def test_a_killed_build_leaves_nothing_that_looks_whole_and_the_next_one_completes(tmp_path: Path):
    victim = start_build(tmp_path, 60)
    assert victim.stdout is not None
    while not victim.stdout.readline().startswith("3"):
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not list(tmp_path.glob("quick-*/world.json"))
    assert list(tmp_path.glob(".quick-*"))
    assert start_build(tmp_path, 60).communicate(timeout=300)[0].strip().split("\n")[-1].startswith("built")
    assert len(list(tmp_path.glob("quick-*/world.json"))) == 1
    assert not list(tmp_path.glob(".quick-*"))


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    world = tiny_world("quick", cache=blocked / "cache", **SHORT)
    assert world.model_path.is_dir() and tmp_path not in world.folder.parents
