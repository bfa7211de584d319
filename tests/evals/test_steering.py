"""Steering in numbers: batches give what each text gives alone, controls are fair, verdicts follow the numbers."""

import math

import numpy as np
import pytest
import torch

from hubsae.core.errors import ConfigError, DataError
from hubsae.core.hooks import edit_hook
from hubsae.evals import steering
from hubsae.evals.steering import FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE, UNSTEERED

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23], [30, 40, 50]]
NEW = 6


@pytest.fixture(scope="module")
def measured(qwen, tokenizer, make_sae):
    sae = make_sae()
    chosen = steering.directions(sae, {3: range(40), 9: [60, 61]}, maxima={3: 4.0, 9: 2.5}, hook=1)
    return chosen, steering.dose_response(
        qwen, tokenizer, PROMPTS, chosen, [0.5, 2.0], max_new_tokens=NEW, rows_at_once=7
    )


def alone(model, prompt, hook, added, ends):
    """The definition, written out: one text, no padding, no cache; its continuation and the loss on it unsteered."""

    def logits(ids, vector):
        with torch.no_grad(), edit_hook(model, hook, lambda h, _: h + vector):
            return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    ids = list(prompt)
    while len(ids) < len(prompt) + NEW and (len(ids) == len(prompt) or ids[-1] not in ends):
        ids.append(int(logits(ids, added)[-1].argmax()))
    clean = logits(ids, 0 * added)
    loss = -sum(float(clean[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
    return ids[len(prompt) :], loss, logits


@pytest.mark.parametrize("which", [0, 2, 4])
def test_batches_of_mixed_directions_give_what_each_text_gives_alone(which, measured, qwen):
    chosen, result = measured
    direction, ends = chosen[which], [qwen.generation_config.eos_token_id]
    for strength in (0.5, 2.0):
        row = result.row(direction, strength)
        nll = kl = n = kl_n = found = said = 0.0
        for prompt in PROMPTS:
            ids, loss, logits = alone(qwen, prompt, 1, strength * direction.vector, ends)
            base, _, _ = alone(qwen, prompt, 1, 0 * direction.vector, ends)
            whole, span = [*prompt, *base], slice(len(prompt) - 1, len(prompt) + len(base) - 1)
            p, q = (logits(whole, s * direction.vector)[span] for s in (0.0, strength))
            kl, kl_n = kl + float((p.exp() * (p - q)).sum()), kl_n + len(base)
            nll, n = nll + loss, n + len(ids)
            hits = sum(i in direction.tokens for i in ids)
            found, said = found + hits, said + (hits > 0)
        assert row.tokens == n
        assert row.said == said / len(PROMPTS)
        assert row.token_rate == pytest.approx(found / n)
        assert row.perplexity == pytest.approx(math.exp(nll / n), rel=1e-4)
        assert row.kl == pytest.approx(kl / kl_n, rel=1e-3, abs=1e-6)
        assert row.norm == pytest.approx(strength * float(direction.vector.norm()))


def test_controls_have_the_norm_and_the_tokens_of_their_feature(measured, make_sae):
    chosen, _ = measured
    assert [d.kind for d in chosen] == [FEATURE, RANDOM_FEATURE, RANDOM_DIRECTION] * 2
    row = make_sae().W_dec[3].detach()
    assert torch.allclose(chosen[0].vector, 4.0 * row, rtol=1e-5)  # one unit is what the feature adds at its maximum
    for feature, *beside in (chosen[:3], chosen[3:]):
        for control in beside:
            assert control.of == feature.name and control.tokens == feature.tokens
            assert float(control.vector.norm()) == pytest.approx(float(feature.vector.norm()), rel=1e-5)
            assert abs(float(torch.cosine_similarity(control.vector, feature.vector, 0))) < 0.9


def test_without_maxima_a_strength_is_the_length_of_what_is_added(make_sae):
    chosen = steering.directions(make_sae(), {3: [1]}, hook=1, controls=2)
    assert len(chosen) == 5
    assert all(float(d.vector.norm()) == pytest.approx(1.0, rel=1e-5) for d in chosen)


def test_the_unsteered_model_stands_in_every_direction_at_strength_zero(measured):
    chosen, result = measured
    rows = [row for row in result.rows() if row.strength == 0]
    assert len(rows) == len(chosen)
    assert {row.kl for row in rows} == {0.0} and len({row.perplexity for row in rows}) == 1
    assert len(result.texts[UNSTEERED, 0.0]) == len(PROMPTS)
    assert {"said_low", "said_high", "kl_low", "perplexity_high"} <= rows[0].flat().keys()


def test_continuations_do_not_depend_on_the_batches(qwen, tokenizer, make_sae):
    chosen = steering.directions(make_sae(), {3: [1]}, hook=1)

    def texts(**options):
        return steering.dose_response(qwen, tokenizer, PROMPTS, chosen, [1.0], max_new_tokens=NEW, **options).texts

    assert texts() == texts(rows_at_once=3)


def test_a_judge_takes_the_place_of_tokens_and_sees_prompt_and_continuation(qwen, tokenizer, make_sae):
    seen = []

    def judge(direction, prompt, text):
        seen.append((direction.name, prompt, text))
        return 0.25

    chosen = steering.directions(make_sae(), {3: [1]}, hook=1)[:1]
    result = steering.dose_response(qwen, tokenizer, PROMPTS[:2], chosen, [1.0], max_new_tokens=3, judge=judge)
    assert {row.said for row in result.rows()} == {0.25}
    assert len(seen) == 4 and seen[0][1] == tokenizer.decode(PROMPTS[0])


def made_up(feature, control, repetition=0.0):
    """A result with given outcomes per prompt at strength 1; the unsteered model never says the token."""
    names = ["f", "c"]
    chosen = [
        steering.Direction("f", torch.ones(2), frozenset([1])),
        steering.Direction("c", torch.ones(2), frozenset([1]), RANDOM_DIRECTION, "f"),
    ]
    n = len(feature)
    sums = {
        "tokens": np.full(n, 10.0), "nll": np.full(n, 10.0), "kl": np.ones(n), "kl_tokens": np.full(n, 10.0),
        "repeated": np.full(n, 8 * repetition), "ngrams": np.full(n, 8.0),
    }  # fmt: skip
    said = {("f", 1.0): np.array(feature, float), ("c", 1.0): np.array(control, float)}
    said |= {(name, 0.0): np.zeros(n) for name in names}
    keys = [(UNSTEERED, 0.0), *((name, 1.0) for name in names)]
    return steering.SteeringResult(
        chosen, [1.0], [""] * n, dict.fromkeys(keys, sums), said, {k: np.zeros(n) for k in said}, {}
    )


@pytest.mark.parametrize(
    ("feature", "control", "repetition", "verdict"),
    [
        ([1] * 8, [0] * 8, 0.0, "steers"),
        ([1] * 8, [0] * 8, 0.9, "only where the text breaks"),
        ([1] * 8, [1] * 8, 0.0, "does not steer"),
        ([1, 0, 0, 0, 0, 0, 0, 0], [0] * 8, 0.0, "does not steer"),
    ],
)
def test_a_feature_steers_only_where_it_beats_its_controls_in_text_that_is_whole(feature, control, repetition, verdict):
    (found,) = made_up(feature, control, repetition).reliability()
    assert found.verdict == verdict
    assert found.gain == pytest.approx(np.mean(feature) - np.mean(control))


def test_words_are_found_whatever_their_case_and_spaces(tokenizer):
    assert steering.tokens_of(tokenizer, ["W7 ", "w8"]) == {7, 8}


def test_what_cannot_be_measured_is_refused(qwen, tokenizer, make_sae):
    chosen = steering.directions(make_sae(), {3: [1]}, hook=1)
    with pytest.raises(DataError):
        steering.dose_response(qwen, tokenizer, PROMPTS, chosen, [0.0])
    with pytest.raises(ConfigError):
        steering.dose_response(qwen, tokenizer, PROMPTS, [chosen[0], chosen[0]], [1.0])
    with pytest.raises(ConfigError):
        steering.directions(make_sae(), {3: [1]}, hook=1, controls=5, pool=[3, 4])
