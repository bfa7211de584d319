"""Splice metrics: token-weighted, padding never touched, the same cached and uncached, for every family."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hubsae import evals
from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, DataError, HookError
from hubsae.core.hooks import edit_hook
from hubsae.evals.texts import encode_texts
from hubsae.hub.sae import HubSAE

FAMILIES = ["qwen2", "llama", "gemma", "gpt2", "gpt_neox"]


@pytest.fixture(scope="module")
def texts():
    """Texts of very different lengths, as ids with a prompt part."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for length in (5, 30, 12, 2, 24, 7, 18, 9):
        ids = torch.randint(3, 96, (length,), generator=generator)
        out.append({"input_ids": ids, "is_prompt": torch.arange(length) < max(1, length // 2)})
    return out


def one_by_one(model, sae, hook, texts, vector=None):
    """The definition, written out: each text alone, no padding, one token at a time."""
    sums = {"n": 0, "clean": 0.0, "sae": 0.0, "mean": 0.0, "zero": 0.0, "kl": 0.0}
    edits = {
        "sae": lambda h, _: sae(h.float()).to(h.dtype),
        "mean": lambda h, _: vector.to(h).expand_as(h),
        "zero": lambda h, _: torch.zeros_like(h),
    }
    with torch.no_grad():
        for text in texts:
            ids = text["input_ids"][None]
            clean = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            sums["n"] += ids.shape[1] - 1
            sums["clean"] += float(F.nll_loss(clean, ids[0, 1:], reduction="sum"))
            for name, edit in edits.items():
                with edit_hook(model, hook, edit):
                    other = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
                sums[name] += float(F.nll_loss(other, ids[0, 1:], reduction="sum"))
                if name == "sae":
                    sums["kl"] += float((clean.exp() * (clean - other)).sum())
    return {name: value / sums["n"] for name, value in sums.items()} | {"n": sums["n"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", ["layers.1", "layers.0.mlp_out"])
def test_padded_batches_give_what_each_text_gives_alone(family, hook, make_model, make_sae, texts):
    model, sae = make_model(family), make_sae()
    seen = []
    from hubsae.core.hooks import read_hook

    with torch.no_grad(), read_hook(model, hook, lambda h: seen.append(h[0])):
        for text in texts:
            model(input_ids=text["input_ids"][None])
    mean = torch.cat(seen).double().mean(0)
    expected = one_by_one(model, sae, hook, texts, mean)
    result = evals.splice(model, None, sae, hook, texts, batch_tokens=90)
    for metric, name in (
        ("ce_clean", "clean"),
        ("ce_sae", "sae"),
        ("ce_mean", "mean"),
        ("ce_zero", "zero"),
        ("kl", "kl"),
    ):
        assert result.value(metric) == pytest.approx(expected[name], rel=2e-5, abs=2e-6), metric
    assert result.get("ce_sae").n_tokens == expected["n"]
    assert result.value("delta_ce") == pytest.approx(expected["sae"] - expected["clean"], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7])
def test_cached_and_uncached_agree(family, chunk, make_model, make_sae, texts):
    model, sae, few = make_model(family), make_sae(), [texts[i] for i in (0, 2, 7)]
    whole = evals.splice(model, None, sae, "layers.1", few)
    cached = evals.splice(model, None, sae, "layers.1", few, cache_chunk=chunk)
    for metric in ("ce_clean", "ce_sae", "ce_mean", "ce_zero", "kl"):
        assert cached.value(metric) == pytest.approx(whole.value(metric), rel=3e-5, abs=3e-6), metric


def test_bfloat16_models_run_and_stay_near_float32(make_model, make_sae, texts):
    sae = make_sae()
    half = make_model("qwen2", torch.bfloat16)
    single = make_model("qwen2", torch.bfloat16).float()
    a, b = (evals.splice(m, None, sae, "layers.1", texts) for m in (half, single))
    assert a.value("ce_sae") == pytest.approx(b.value("ce_sae"), rel=0.05)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_perfect_reconstruction_changes_nothing(qwen, texts):
    eye = torch.eye(32)
    config = SAEConfig(architecture="relu", d_in=32, d_sae=64, apply_b_dec_to_input=False)
    tensors = {
        "W_enc": torch.cat([eye, -eye], 1),
        "b_enc": torch.zeros(64),
        "W_dec": torch.cat([eye, -eye]),
        "b_dec": torch.zeros(32),
    }
    result = evals.splice(qwen, None, HubSAE(config, tensors), "layers.1", texts)
    assert result.value("delta_ce") == pytest.approx(0, abs=1e-7)
    assert result.value("kl") == pytest.approx(0, abs=1e-9)
    assert result.value("frac_recovered_mean") == pytest.approx(1, abs=1e-6)


def test_zero_ablation_after_the_last_layer_costs_log_vocabulary(qwen, make_sae, texts):
    result = evals.splice(qwen, None, make_sae(), "layers.2", texts)
    assert result.value("ce_zero") == pytest.approx(math.log(97), abs=1e-6)


def test_scopes_split_tokens_by_what_is_predicted_and_add_up(qwen, make_sae, texts):
    result = evals.splice(qwen, None, make_sae(), "layers.1", texts, scope="response")
    n = {scope: result.get("ce_sae", scope).n_tokens for scope in ("all", "prompt", "response")}
    assert n["response"] == sum(int((~t["is_prompt"][1:]).sum()) for t in texts)
    assert n["prompt"] + n["response"] == n["all"]
    parts = sum(n[s] * result.value("ce_sae", s) for s in ("prompt", "response"))
    assert parts / n["all"] == pytest.approx(result.value("ce_sae", "all"))
    assert result.value("ce_sae") == result.value("ce_sae", "response")


def test_only_the_asked_positions_are_replaced(qwen, make_sae, texts):
    sae = make_sae()
    every = evals.splice(qwen, None, sae, "layers.1", texts, scope="response")
    some = evals.splice(qwen, None, sae, "layers.1", texts, scope="response", replace="response")
    kept = evals.splice(qwen, None, sae, "layers.1", texts, replace="not position_0")
    assert some.value("ce_sae", "response") != pytest.approx(every.value("ce_sae", "response"), rel=1e-4)
    assert kept.value("ce_sae") != pytest.approx(every.value("ce_sae", "all"), rel=1e-4)
    # nothing before the response is touched, so its prediction is the clean one up to its first token
    assert some.value("ce_sae", "prompt") == pytest.approx(some.value("ce_clean", "prompt"), abs=1e-6)
    assert (every.replaced, some.replaced) == ("all", "response")


def test_padding_is_never_shown_to_the_sae(qwen, make_sae, texts):
    seen = []

    class Spy(HubSAE):
        def forward(self, x):
            seen.append(x.shape)
            return super().forward(x)

    sae = make_sae("batch_topk", k=4)
    evals.splice(qwen, None, Spy(sae.config, sae.tensors()), "layers.1", texts, batch_tokens=10_000)
    assert seen == [torch.Size([sum(len(t["input_ids"]) for t in texts), 32])]


def test_losses_are_weighted_by_tokens_not_by_text(qwen, make_sae, texts):
    result = evals.splice(qwen, None, make_sae(), "layers.1", texts)
    rows = [row for row in result.per_text if row["scope"] == "all"]
    by_text = np.mean([row["ce_sae"] / row["n"] for row in rows])
    by_token = sum(row["ce_sae"] for row in rows) / sum(row["n"] for row in rows)
    assert result.value("ce_sae") == pytest.approx(by_token)
    assert abs(by_text - by_token) > 1e-4


def test_the_interval_is_over_texts_and_seeded(qwen, make_sae, texts):
    a, b = (evals.splice(qwen, None, make_sae(), "layers.1", texts) for _ in range(2))
    assert a.measures == b.measures
    measure = a.get("delta_ce")
    assert measure.interval[0] < measure.value < measure.interval[1]
    assert measure.interval_kind == "95 % percentile bootstrap over 8 texts"
    assert a.metrics()[0].scope == "all"


def test_many_saes_share_the_clean_run_and_give_what_each_gives_alone(qwen, make_sae, texts):
    saes = {"a": (make_sae(), "layers.0"), "b": (make_sae(seed=1), "layers.1"), "c": (make_sae(k=2), "layers.1")}
    calls = []
    handle = qwen.register_forward_pre_hook(lambda *_: calls.append(1))
    together = evals.splice_many(qwen, None, saes, texts, batch_tokens=10_000)
    handle.remove()
    # 1 clean, 2 ablations at 2 hooks, 3 SAEs; both means come from one pass of the backbone
    assert len(calls) == 1 + 4 + 3
    for name, (sae, hook) in saes.items():
        alone = evals.splice(qwen, None, sae, hook, texts, batch_tokens=10_000, name=name)
        assert alone.measures == together[name].measures


def test_the_model_is_left_as_it_was(qwen, make_sae, texts):
    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in qwen.modules()]

    before = hooks()
    qwen.train()
    evals.splice(qwen, None, make_sae(), "layers.1", texts)
    assert qwen.training
    qwen.eval()
    assert hooks() == before


def test_texts_of_every_kind(tokenizer, qwen, make_sae):
    pair = ("w5 w6 w7", " w8 w9")
    chat = {"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]}
    kinds = [
        "w5 w6 w7",
        pair,
        {"prompt": pair[0], "completion": pair[1]},
        {"question": pair[0], "answer": pair[1]},
        chat,
        [5, 6, 7],
        torch.tensor([5, 6, 7]),
        {"text": "w5 w6 w7"},
    ]
    encoded, cut = encode_texts(kinds, tokenizer, max_length=5)
    assert [t.ids.tolist() for t in encoded[:2]] == [[5, 6, 7], [5, 6, 7, 8, 9]]
    assert encoded[1].is_response.tolist() == [False, False, False, True, True]
    assert encoded[2].ids.tolist() == encoded[3].ids.tolist() == encoded[1].ids.tolist()
    assert encoded[4].ids.tolist() == [90, 5, 6, 92, 91] and cut == 1
    whole = encode_texts([chat], tokenizer)[0][0]
    assert whole.ids.tolist() == [90, 5, 6, 92, 91, 7, 8, 92]
    assert whole.is_response.tolist() == [False] * 5 + [True] * 3
    said = [{"from": "human", "value": "w5 w6"}, {"from": "gpt", "value": "w7 w8"}]
    asked = {"prompt": chat["messages"][:1], "response": "w7 w8"}
    alike = [{"conversations": said}, said, chat["messages"], asked, {**chat, "text": "w9"}]
    for other in encode_texts(alike, tokenizer)[0]:
        assert torch.equal(other.ids, whole.ids) and torch.equal(other.is_response, whole.is_response)
        assert other.labels.keys() == whole.labels.keys()
    assert encode_texts([{"conversation": "c-17", "text": "w5 w6 w7"}], tokenizer)[0][0].ids.tolist() == [5, 6, 7]
    with pytest.raises(DataError, match="text 0 has a message without role or content"):
        encode_texts([[{"role": "user", "text": "w5"}]], tokenizer)
    assert [t.ids.tolist() for t in encoded[5:]] == [[5, 6, 7]] * 3
    batch = tokenizer(["w5 w6 w7", "w8"], padding=True, padding_side="left", return_tensors="pt")
    assert [t.ids.tolist() for t in encode_texts(batch)[0]] == [[5, 6, 7], [8]]
    result = evals.splice(qwen, tokenizer, make_sae(), "layers.1", kinds, max_length=5)
    assert result.n_truncated == 1 and result.n_texts == 8


def test_left_padded_input_gives_the_numbers_of_the_bare_texts(tokenizer, qwen, make_sae):
    lines = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13 w14 w15 w16"]
    padded = tokenizer(lines, padding=True, padding_side="left", return_tensors="pt")
    a = evals.splice(qwen, tokenizer, make_sae(), "layers.1", lines)
    b = evals.splice(qwen, None, make_sae(), "layers.1", padded)
    assert a.measures == b.measures


def test_one_token_texts_are_counted_as_skipped(qwen, make_sae):
    result = evals.splice(qwen, None, make_sae(), "layers.1", [[5], [5, 6, 7], [8]])
    assert (result.n_texts, result.n_skipped) == (1, 2)
    assert result.get("ce_sae").interval is None


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([[5], [6]], "no predicted token"),
        ({"input_ids": torch.zeros(2, 4), "attention_mask": torch.zeros(2, 4)}, "no text has a real token"),
        ([], "no texts"),
        ([[5, 97]], "vocabulary has 97"),
        (["w5"], "need a tokenizer"),
        ([3.5], "cannot read a text"),
    ],
)
def test_unusable_texts_are_said_to_be(texts, error, qwen, make_sae):
    with pytest.raises(DataError, match=error):
        evals.splice(qwen, None, make_sae(), "layers.1", texts)


def test_a_response_scope_needs_responses(qwen, make_sae):
    with pytest.raises(DataError, match="which tokens are the response"):
        evals.splice(qwen, None, make_sae(), "layers.1", [[5, 6, 7]], scope="response")


def test_a_hook_point_the_model_lacks_or_of_another_width(qwen, make_sae):
    with pytest.raises(HookError, match="has no layer 7"):
        evals.splice(qwen, None, make_sae(), "layers.7", [[5, 6, 7]])
    with pytest.raises(HookError, match="width 32, SAE 'sae' takes 16"):
        evals.splice(qwen, None, make_sae(d_in=16), "layers.1", [[5, 6, 7]])


def test_a_vocabulary_that_is_not_the_one_trained_on(qwen, make_sae):
    sae = make_sae()
    sae.metadata.base_model.id = "someone/else"
    sae.metadata.base_model.vocab_size = 151936
    with pytest.raises(ConfigError, match="vocabulary of 151936, this one has 97"):
        evals.splice(qwen, None, sae, "layers.1", [[5, 6, 7]])


def test_another_model_or_layer_is_refused_unless_it_is_asked_for(qwen, make_sae):
    sae = make_sae()
    sae.metadata.base_model.id = "someone/else"
    qwen.config._name_or_path = "someone/this"
    try:
        with pytest.raises(ConfigError, match="trained on someone/else, this is someone/this"):
            evals.splice(qwen, None, sae, "layers.1", [[5, 6, 7]])
        sae.metadata.base_model.id, sae.metadata.hook.layer = "someone/this", 2
        with pytest.raises(HookError, match=r"trained at layers\.2, these activations are those of layers\.1"):
            evals.splice(qwen, None, sae, "layers.1", [[5, 6, 7]])
        evals.splice(qwen, None, sae, "layers.1", [[5, 6, 7]], force=True)
    finally:
        qwen.config._name_or_path = ""


def test_weights_that_are_not_finite_are_an_error_and_not_a_number(qwen, make_sae):
    sae = make_sae()
    sae.b_dec[0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite in the sae run"):
        evals.splice(qwen, None, sae, "layers.1", [[5, 6, 7]])


def test_no_recovery_is_claimed_where_the_ablation_has_no_effect(qwen, make_sae):
    """The mean over one repeated position is that position: mean ablation changes nothing."""
    result = evals.splice(qwen, None, make_sae(), "layers.1", [[5, 6]] * 3, replace="not position_0")
    measure = result.get("frac_recovered_mean")
    assert measure.value is None and "no effect" in measure.note
    assert all(m.name != "frac_recovered_mean" for m in result.metrics())


def by_hand(model, sae, texts, hook, keep):
    """Clean and spliced losses over the predicted tokens of a scope, with only its tokens replaced."""
    clean, spliced, kl, n = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = text["input_ids"][None]
            inside = keep(text)
            a = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with edit_hook(model, hook, lambda h, _, m=inside: torch.where(m[None, :, None], sae(h), h)):
                b = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            at = torch.arange(len(a))[inside[1:]]
            clean -= float(a[at, ids[0, 1:][at]].sum())
            spliced -= float(b[at, ids[0, 1:][at]].sum())
            kl += float((a[at].exp() * (a[at] - b[at])).sum())
            n += len(at)
    return clean / n, spliced / n, kl / n, n


@pytest.mark.parametrize(
    ("exclude", "keep"),
    [
        (["position_0"], lambda t: torch.arange(len(t["input_ids"])) > 0),
        (["is_special", "position_0"], lambda t: ~t["is_special"] & (torch.arange(len(t["input_ids"])) > 0)),
    ],
)
def test_what_training_left_out_is_left_alone_and_not_counted(exclude, keep, qwen, make_sae, texts):
    texts = [{**t, "is_special": t["input_ids"] % 5 == 0} for t in texts]
    sae = make_sae()
    sae.metadata.training.exclude = exclude
    result = evals.splice(qwen, None, sae, "layers.1", texts)
    clean, spliced, kl, n = by_hand(qwen, sae, texts, "layers.1", keep)
    assert result.scope == result.replaced == sae.metadata.own_scope
    assert result.get("ce_sae").n_tokens == n
    for metric, expected in (("ce_clean", clean), ("ce_sae", spliced), ("kl", kl)):
        assert result.value(metric) == pytest.approx(expected, rel=1e-5, abs=1e-7), metric
    every = evals.splice(qwen, None, sae, "layers.1", texts, replace="all")
    assert every.value("ce_sae") != pytest.approx(spliced, rel=1e-4)


def test_massive_tokens_are_left_alone_where_training_left_them_out(qwen, make_sae, texts):
    norms = {}
    with torch.no_grad():
        for number, text in enumerate(texts):
            from hubsae.core.hooks import read_hook

            with read_hook(qwen, "layers.1", lambda h, number=number: norms.update({number: h[0].norm(dim=-1)})):
                qwen(input_ids=text["input_ids"][None])
    bound = float(torch.cat(list(norms.values())).median())
    sae = make_sae()
    sae.metadata.training.exclude, sae.metadata.training.massive_above = ["massive"], bound
    result = evals.splice(qwen, None, sae, "layers.1", texts, batch_tokens=30)
    numbers = {id(t): n for n, t in enumerate(texts)}
    _, spliced, kl, n = by_hand(qwen, sae, texts, "layers.1", lambda t: norms[numbers[id(t)]] <= bound)
    assert result.get("ce_sae").n_tokens == n
    assert result.value("ce_sae") == pytest.approx(spliced, rel=1e-5)
    assert result.value("kl") == pytest.approx(kl, rel=1e-5)


def test_a_column_named_solution_is_a_response(tokenizer):
    encoded, _ = encode_texts([{"problem": "w5 w6", "solution": " w7 w8"}], tokenizer)
    assert encoded[0].is_response.tolist() == [False, False, True, True]


def test_tokens_of_a_chat_know_their_role_and_what_is_template(tokenizer, qwen, make_sae):
    chat = {"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]}
    encoded, _ = encode_texts([chat], tokenizer)
    assert encoded[0].labels["is_template"].tolist() == [True, False, False, True, True, False, False, True]
    assert encoded[0].labels["is_assistant"].tolist() == [False] * 5 + [True] * 3
    result = evals.splice(qwen, tokenizer, make_sae(), "layers.1", [chat], scopes=["role=user & not template"])
    assert result.get("ce_sae", "role=user & not template").n_tokens == 2
