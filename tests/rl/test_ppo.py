"""The PPO loop: its update against a sequence-by-sequence reference, resume to the bit, stages, controls, errors."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hubsae.core.errors import TrainingError
from hubsae.core.files import sha256_file
from hubsae.rl.objectives import gae, whiten
from hubsae.rl.rollout import Sampling, log_probs_of, sample
from hubsae.rl.scorers import SCORERS


def rolled(ppo, count: int = 8):
    prompts = ppo.train[:count]
    rollout = sample(ppo.policy.model, ppo.tokenizer, [p.ids for p in prompts], Sampling(16), seed=1)
    texts = rollout.texts(ppo.tokenizer)
    scores = torch.tensor([SCORERS["flexible"](t, p.gold) for t, p in zip(texts, prompts, strict=True)])
    return ppo.observe(rollout), scores


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def take_gradients(ppo, experience) -> tuple[dict, dict]:
    """The gradients of one update over the whole batch, before the optimisers use them."""
    found: list[dict] = []
    ppo.step = 1
    ppo._apply = lambda optimizer: found.append(gradients(ppo.critic) | gradients(ppo.policy.model)) or 0.0
    ppo._update_once(experience, torch.arange(len(experience.old)))
    return gradients(ppo.critic), gradients(ppo.policy.model)


def test_the_ratio_is_one_before_the_first_update(make_ppo, tmp_path):
    ppo = make_ppo(tmp_path)
    experience, _ = rolled(ppo)
    with torch.no_grad():
        again, _ = log_probs_of(ppo.policy.model, experience.rollout)
    assert torch.equal(again, experience.old)
    assert torch.allclose(experience.ref, experience.old, atol=1e-5)
    assert ppo.policy.model.training


def test_one_update_has_the_gradients_of_the_loss_written_out_sequence_by_sequence(make_ppo, tmp_path):
    ppo = make_ppo(tmp_path, micro_batch=3, lr=1e-3)
    torch.nn.init.normal_(ppo.critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    # a policy that has moved away from its reference and from the one that sampled
    experience, scores = rolled(ppo)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ppo.policy.trainable().values():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    experience.estimate(scores, ppo.config)
    critic_got, policy_got = take_gradients(ppo, experience)

    ppo.critic.zero_grad()
    ppo.policy.model.zero_grad()
    rollout = experience.rollout
    sequences = []
    for row in range(len(scores)):
        real = rollout.mask[row].bool()
        tokens = rollout.tokens[row][real]
        start = int(rollout.mask[row, : rollout.prompt_width].sum())
        n = len(tokens) - start
        logits = ppo.policy.model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        values = ppo.critic(tokens[None], torch.ones_like(tokens)[None], torch.arange(len(tokens))[None])[0]
        old, ref = experience.old[row, :n], experience.ref[row, :n]
        rewards = -ppo.config.kl_coef * (old - ref)
        rewards[-1] += scores[row]
        returns = rewards.flip(0).cumsum(0).flip(0)  # gamma = lambda = 1: the return is the sum of what follows
        sequences.append((logits, values, tokens, start, n, old, returns - experience.values[row, :n], returns))
    everything = torch.cat([s[6] for s in sequences])
    mean, std = everything.mean(), everything.std(unbiased=False)
    count = len(everything)
    policy_loss, value_loss = torch.tensor(0.0), torch.tensor(0.0)
    for row, (logits, values, tokens, start, n, old, advantages, returns) in enumerate(sequences):
        for i in range(n):
            at = start + i - 1
            ratio = torch.exp(logits[at, tokens[at + 1]] - old[i])
            a = (advantages[i] - mean) / std
            entropy = -(logits[at].exp() * logits[at]).sum()
            policy_loss = policy_loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.001 * entropy
            v, v_old = values[at], experience.values[row, i]
            limited = v_old + (v - v_old).clamp(-0.5, 0.5)
            value_loss = value_loss + 0.5 * torch.maximum((v - returns[i]) ** 2, (limited - returns[i]) ** 2)
    (policy_loss / count).backward()
    (value_loss / count).backward()
    for got, module in ((critic_got, ppo.critic), (policy_got, ppo.policy.model)):
        expected = gradients(module)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp_min(1e-6)
            assert (got[name] - gradient).abs().max() < 3e-3 * scale, name


def test_advantages_are_whitened_and_returns_are_not(make_ppo, tmp_path):
    ppo = make_ppo(tmp_path)
    experience, scores = rolled(ppo)
    experience.estimate(scores, ppo.config)
    mask = experience.mask
    rewards = -ppo.config.kl_coef * (experience.old - experience.ref) * mask
    for row, length in enumerate(experience.rollout.lengths.tolist()):
        rewards[row, length - 1] += scores[row]
    advantages, returns = gae(rewards, experience.values, mask, 1.0, 1.0)
    assert torch.allclose(experience.returns, returns) and torch.allclose(
        experience.advantages, whiten(advantages, mask)
    )
    assert torch.allclose(returns, (advantages + experience.values) * mask)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all that a run leaves; of the state its tensors, because torch.save stores more than those."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: sha256_file(path) for name, path in files.items() if name != "state.pt"}


def tensors(value, prefix="") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, inner in items for k, v in tensors(inner, f"{prefix}.{key}").items()}


@pytest.fixture(scope="module")
def whole_run(make_ppo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "rl"
    make_ppo(folder).run()
    return folder


def test_stages_are_saved_at_the_listed_steps_as_adapters(whole_run):
    assert sorted(p.name for p in (whole_run / "stages").iterdir()) == ["ppo_step2", "ppo_step4"]
    adapter = load_file(whole_run / "stages/ppo_step2/adapter_model.safetensors")
    assert any(value.any() for value in adapter.values())
    assert (whole_run / "stages/ppo_step2/tokenizer.json").is_file()


def test_metrics_have_a_row_per_step_and_every_promised_column(whole_run):
    rows = list(csv.DictReader((whole_run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    promised = {"reward", "score_strict", "score_flexible", "kl", "length", "entropy", "explained_variance"}
    assert promised | {"clip_fraction"} <= rows[0].keys()
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert abs(float(rows[0]["kl"])) < 1e-5 < abs(float(rows[-1]["kl"]))
    tested = list(csv.DictReader((whole_run / "accuracy.csv").open()))
    assert [int(row["step"]) for row in tested] == [0, 2, 4]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_and_continued_it_is_the_same_run_to_the_bit(make_ppo, tmp_path, whole_run, stop):
    class Stopped(Exception):
        pass

    def interrupt(done, total, text):
        if done == stop:
            raise Stopped

    with pytest.raises(Stopped):
        make_ppo(tmp_path).run(interrupt)
    steps: list[float] = []
    make_ppo(tmp_path).run(lambda done, total, text: steps.append(done))
    # states are saved every second step
    assert steps == list(range(stop // 2 * 2 + 1, 5))
    assert contents(tmp_path) == contents(whole_run)
    one, two = (tensors(torch.load(f / "state.pt", weights_only=True)) for f in (tmp_path, whole_run))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hubsae.rl.config import RLConfig
from hubsae.rl.policy import LoRA
from hubsae.rl import ppo as module
from hubsae.rl.problems import PromptStyle, Question, make_prompts
from hubsae.recipes.tiny import tiny_world
sys.path.insert(0, sys.argv[4])
from conftest import SMALL

world = tiny_world("quick", cache=sys.argv[2])
def made(problems):
    questions = [Question(p.question, p.answer) for p in problems]
    return make_prompts(world.tokenizer, questions, PromptStyle(), max_prompt=64)
run = module.PPO(RLConfig(**SMALL), Path(sys.argv[1]), model=world.model_path, tokenizer=world.tokenizer,
                 train=made(world.train_problems), test=made(world.test_problems[:32]))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "while the state is written":
    # the temporary file is there, half of it; it must never be taken for a state
    save = torch.save
    torch.save = lambda v, path: (Path(path).write_bytes(b"half"), die()) if run.step == 4 else save(v, path)
if sys.argv[3] == "while a stage is written":
    run.policy.save_stage = lambda folder, _: (folder.mkdir(parents=True), (folder / "x").write_text("x"), die())
if sys.argv[3] == "between stage and state":
    run._save_state = die
run.run()
"""


@pytest.mark.parametrize(
    "when",
    [
        "while the state is written",
        pytest.param("while a stage is written", marks=pytest.mark.slow),
        pytest.param("between stage and state", marks=pytest.mark.slow),
    ],
)
def test_killed_at_the_worst_moments_it_continues_to_the_same_end(make_ppo, tmp_path, whole_run, world_cache, when):
    folder = tmp_path / "rl"
    argv = [sys.executable, "-c", KILLED, str(folder), str(world_cache), when, str(Path(__file__).parent)]
    killed = subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    make_ppo(folder).run()
    assert contents(folder) == contents(whole_run)


def test_the_critic_learns_alone_in_its_warm_up(make_ppo, tmp_path):
    ppo = make_ppo(tmp_path, critic_warmup=1, steps=2, test_every=0)
    before = {name: p.detach().clone() for name, p in ppo.policy.trainable().items()}
    ppo.step = 1
    ppo.train_step()
    assert all(torch.equal(before[name], p) for name, p in ppo.policy.trainable().items())
    assert ppo.critic.head.weight.any()
    ppo.step = 2
    ppo.train_step()
    assert not all(torch.equal(before[name], p) for name, p in ppo.policy.trainable().items())


def test_without_lora_all_weights_train_and_a_stage_is_a_whole_checkpoint(make_ppo, tmp_path):
    from transformers import AutoModelForCausalLM

    make_ppo(tmp_path, lora=None, lr=1e-4, steps=1, save_steps=(1,), test_every=0).run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stages/ppo_step1")
    assert type(model).__name__ == "Qwen2ForCausalLM"


def test_numbers_that_are_not_finite_stop_the_run_and_say_where_the_last_good_state_is(make_ppo, tmp_path):
    ppo = make_ppo(tmp_path, test_every=0)
    with torch.no_grad():
        ppo.critic.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"(?s)value_loss.*not finite.*state\.pt"):
        ppo.run()
