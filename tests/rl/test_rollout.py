"""Sampling and reading back: padding, columns, positions, temperature, the checkpoint's own generation defaults."""

from __future__ import annotations

import pytest
import torch

from hubsae.activations.generation import end_ids
from hubsae.rl.objectives import position_ids
from hubsae.rl.policy import LoRA, Policy, new_critic
from hubsae.rl.problems import PromptStyle, Question, batch_of_step, make_prompts
from hubsae.rl.rollout import Sampling, log_probs_of, sample, values_of


@pytest.fixture(scope="module")
def rolled(quick_world):
    prompts = [quick_world.prompt_ids(p) for p in quick_world.test_problems[:24]]
    prompts += [prompts[0][:5], prompts[1][-9:]]  # very different lengths
    rollout = sample(quick_world.model, quick_world.tokenizer, prompts, Sampling(20), seed=3)
    return prompts, rollout


def alone(rollout, row: int) -> tuple[torch.Tensor, int]:
    """A sequence without any padding, and the length of its prompt."""
    real = rollout.mask[row].bool()
    prompt = int(rollout.mask[row, : rollout.prompt_width].sum())
    return rollout.tokens[row][real], prompt


def test_responses_begin_at_one_column_and_end_with_their_first_eos(quick_world, rolled):
    prompts, rollout = rolled
    eos, pad = quick_world.tokenizer.eos_token_id, quick_world.tokenizer.pad_token_id
    assert rollout.lengths.unique().numel() > 3
    for row, prompt in enumerate(prompts):
        tokens, length = alone(rollout, row)
        assert tokens[:length].tolist() == prompt
        response = tokens[length:].tolist()
        assert eos not in response[:-1]
        assert response[-1] == eos or len(response) == 20
        assert set(rollout.response[row][~rollout.response_mask[row].bool()].tolist()) <= {pad}


def test_log_probs_of_a_padded_batch_are_those_of_each_sequence_alone(quick_world, rolled):
    _, rollout = rolled
    with torch.no_grad():
        got, entropy = log_probs_of(quick_world.model, rollout, temperature=0.7)
        for row in range(len(rollout.tokens)):
            tokens, start = alone(rollout, row)
            logits = quick_world.model(input_ids=tokens[None]).logits[0] / 0.7
            table = logits.log_softmax(-1)
            for i in range(start, len(tokens)):
                assert got[row, i - start].item() == pytest.approx(table[i - 1, tokens[i]].item(), abs=2e-4)
                expected = -(table[i - 1].exp() * table[i - 1]).sum().item()
                assert entropy[row, i - start].item() == pytest.approx(expected, abs=2e-4)


def test_values_stand_where_the_logits_stand(quick_world, rolled):
    _, rollout = rolled
    critic = new_critic(quick_world.model_path)
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        got = values_of(critic, rollout)
        for row in range(len(rollout.tokens)):
            tokens, start = alone(rollout, row)
            hidden = critic.backbone(input_ids=tokens[None]).last_hidden_state[0]
            expected = (hidden @ critic.head.weight[0])[start - 1 : -1]
            assert torch.allclose(got[row, : len(expected)], expected, atol=1e-3)


def test_left_padding_changes_nothing_with_positions_and_something_without(quick_world):
    tokens = torch.tensor([quick_world.prompt_ids(quick_world.test_problems[0])])
    padded = torch.cat([torch.full((1, 7), quick_world.tokenizer.pad_token_id), tokens], 1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones_like(tokens)], 1)
    with torch.no_grad():
        plain = quick_world.model(input_ids=tokens).logits[0, -1]
        with_positions = quick_world.model(input_ids=padded, attention_mask=mask, position_ids=position_ids(mask))
        no_mask = quick_world.model(input_ids=padded)
    assert torch.allclose(with_positions.logits[0, -1], plain, atol=1e-4)
    assert not torch.allclose(no_mask.logits[0, -1], plain, atol=1e-2)


def test_the_checkpoints_own_sampling_defaults_are_not_used(quick_world, rolled):
    prompts, rollout = rolled
    model = quick_world.load_stage("sft_step200")
    # what instruct checkpoints ship; sampling from a changed distribution would bias every ratio
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0)
    again = sample(model, quick_world.tokenizer, prompts, Sampling(20), seed=3)
    assert torch.equal(again.tokens, rollout.tokens)
    assert model.generation_config.repetition_penalty == 5.0


def test_sampling_follows_the_distribution_that_log_probs_report(quick_world):
    prompt = quick_world.prompt_ids(quick_world.test_problems[0])
    rollout = sample(quick_world.model, quick_world.tokenizer, [prompt] * 2000, Sampling(1, temperature=1.5), seed=0)
    with torch.no_grad():
        probs = (quick_world.model(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    counts = torch.bincount(rollout.response[:, 0], minlength=len(probs)) / 2000
    assert (counts - probs).abs().max() < 0.05


def test_a_seed_fixes_the_responses_and_leaves_the_global_state_alone(quick_world, rolled):
    prompts, rollout = rolled
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    same = sample(quick_world.model, quick_world.tokenizer, prompts, Sampling(20), seed=3)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(same.tokens, rollout.tokens)
    other = sample(quick_world.model, quick_world.tokenizer, prompts, Sampling(20), seed=4)
    assert other.tokens.shape != rollout.tokens.shape or not torch.equal(other.tokens, rollout.tokens)


def test_temperature_zero_is_greedy(quick_world, rolled):
    prompts, _ = rolled
    rollout = sample(quick_world.model, quick_world.tokenizer, prompts, Sampling(20, temperature=0), seed=0)
    with torch.no_grad():
        for row in range(4):
            tokens, start = alone(rollout, row)
            best = quick_world.model(input_ids=tokens[None]).logits[0].argmax(-1)
            assert best[start - 1 : -1].tolist() == tokens[start:].tolist()


def test_every_eos_of_the_checkpoint_ends_a_response(quick_world):
    model = quick_world.load_stage("sft_step200")
    newline = quick_world.tokenizer("\n").input_ids[0]
    model.generation_config.eos_token_id = [quick_world.tokenizer.eos_token_id, newline]
    assert end_ids(model, quick_world.tokenizer) == sorted([quick_world.tokenizer.eos_token_id, newline])
    prompts = [quick_world.prompt_ids(p) for p in quick_world.test_problems[:8]]
    rollout = sample(model, quick_world.tokenizer, prompts, Sampling(20), seed=0)
    for row in range(8):
        response = rollout.response[row][rollout.response_mask[row].bool()].tolist()
        assert newline not in response[:-1]


def test_the_reference_is_the_policy_before_training_in_both_forms(quick_world, rolled):
    _, rollout = rolled
    with torch.no_grad():
        before, _ = log_probs_of(quick_world.model, rollout)
        for lora in (LoRA(r=4, alpha=4), None):
            policy = Policy(quick_world.model_path, lora, seed=0)
            start, _ = log_probs_of(policy.model, rollout)
            assert torch.allclose(start, before, atol=1e-5)
            for parameter in policy.trainable().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            moved, _ = log_probs_of(policy.model, rollout)
            with policy.reference() as reference:
                ref, _ = log_probs_of(reference, rollout)
            assert not torch.allclose(moved, before, atol=1e-2)
            assert torch.allclose(ref, before, atol=1e-5)


def test_there_is_no_dropout_anywhere(quick_world):
    policy = Policy(quick_world.model_path, LoRA(r=4, alpha=4), seed=0)
    critic = new_critic(quick_world.model_path)
    for module in [*policy.model.modules(), *critic.modules()]:
        assert not (isinstance(module, torch.nn.Dropout) and module.p > 0)
        assert getattr(module, "attention_dropout", 0.0) == 0.0


def test_shuffled_gold_rewards_another_problem_but_keeps_the_true_gold(quick_world):
    questions = [Question(p.question, p.answer) for p in quick_world.train_problems[:300]]
    plain = make_prompts(quick_world.tokenizer, questions, PromptStyle(), max_prompt=100)
    mixed = make_prompts(quick_world.tokenizer, questions, PromptStyle(), max_prompt=100, shuffle_gold_seed=0)
    assert [p.gold for p in mixed] == [p.gold for p in plain] == [p.rewarded for p in plain]
    assert sorted(p.rewarded for p in mixed) == sorted(p.gold for p in plain)
    # by chance some golds agree; far from all
    assert sum(p.rewarded == p.gold for p in mixed) < 60


def test_too_long_prompts_are_left_out(quick_world):
    questions = [Question("1 " * 200, "1\n#### 1"), Question("Ann has 2 pens.", "2\n#### 2")]
    kept = make_prompts(quick_world.tokenizer, questions, PromptStyle(), max_prompt=100)
    assert [p.gold for p in kept] == ["2"]


def test_an_epoch_uses_each_problem_once_and_drops_the_incomplete_batch():
    epoch = [i for step in range(1, 6) for i in batch_of_step(53, 10, step, seed=0)]
    assert len(set(epoch)) == 50
    following = [i for step in range(6, 11) for i in batch_of_step(53, 10, step, seed=0)]
    assert len(set(following)) == 50 and epoch != following
    # 7,473 problems in batches of 256 give 29 steps an epoch, hence 116 steps in four
    assert batch_of_step(7473, 256, 29, 0)[:3] != batch_of_step(7473, 256, 30, 0)[:3]
    assert len(batch_of_step(7473, 256, 116, 0)) == 256


def test_the_parquet_for_verl_has_its_columns_and_our_gold(tmp_path):
    import pyarrow.parquet as parquet

    from hubsae.rl.problems import write_verl_parquet

    style = PromptStyle(system="Be exact.", suffix="Think first.")
    questions = [Question("How many?", "1000+234=1234\n#### 1,234"), Question("And now?", "#### 5")]
    rows = parquet.read_table(write_verl_parquet(tmp_path / "test.parquet", questions, style, split="test")).to_pylist()
    assert list(rows[0]) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "How many? Think first."},
    ]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "1234"}
    assert (rows[1]["extra_info"]["split"], rows[1]["extra_info"]["index"]) == ("test", 1)
    assert {row["data_source"] for row in rows} == {"openai/gsm8k"}
