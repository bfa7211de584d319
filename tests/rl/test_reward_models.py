"""Reward models: heads as the checkpoint has them or not at all, steps read where they end, errors by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hubsae.activations.models import load_model
from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, DataError, FormatError
from hubsae.core.sae import SAE
from hubsae.evals.passes import run_pass
from hubsae.evals.ridge import RidgeSums
from hubsae.rl.reward_models import load_reward_model
from hubsae.rl.steps import CallableReward, StepFormat, StepText, split_steps, tokenize
from hubsae.rl.truncated import TruncatedReward

TEXTS = [
    StepText("user\nAnn has 2 cups and gets 3 more.\n", ("2+3=5", "#### 5")),
    StepText("user\nBen has 4 pens.\n", ("4+12=16", "16-3=13", "#### 13")),
    StepText("user\nKim has 1 key and loses it.\n", ("1-1=0",)),
]


@pytest.fixture(scope="module")
def prm(quick_world, tmp_path_factory) -> Path:
    """A process reward model in the layout of Qwen2.5-Math-PRM: remote code beside it, `<extra_0>`, two layers."""
    import transformers

    folder = tmp_path_factory.mktemp("prm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(quick_world.model_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra_0>"]})
    tokenizer.save_pretrained(folder)
    causal = transformers.AutoModelForCausalLM.from_pretrained(quick_world.model_path)
    torch.manual_seed(0)
    causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    causal.save_pretrained(folder)
    weights, d = load_file(folder / "model.safetensors"), causal.config.hidden_size
    weights |= {"score.0.weight": torch.randn(d, d) / 8, "score.0.bias": torch.randn(d) / 8,
                "score.2.weight": torch.randn(2, d) / 8, "score.2.bias": torch.tensor([0.1, -0.1])}  # fmt: skip
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2ForProcessRewardModel"], "num_labels": 2,
        "auto_map": {"AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig", "AutoModel": "modeling_qwen2_rm.Model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_qwen2_rm", "modeling_qwen2_rm"):
        (folder / f"{name}.py").write_text("raise RuntimeError('code of a repo was run')\n")
    return folder


def by_hand(folder: Path, text: StepText) -> np.ndarray:
    """The scores as the model's card computes them, one solution at a time, from its tensors."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    shape = transformers.Qwen2Config.from_pretrained(folder)
    model = transformers.Qwen2Model(shape).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    ids = tokenizer(text.prompt + "".join(f"{s}<extra_0>" for s in text.steps), add_special_tokens=False)["input_ids"]
    places = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<extra_0>")]
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids]))[0][0, places]
        hidden = (hidden @ weights["score.0.weight"].T + weights["score.0.bias"]).relu()
        logits = hidden @ weights["score.2.weight"].T + weights["score.2.bias"]
    return logits.softmax(-1)[:, 1].numpy()


def test_a_process_reward_model_scores_as_its_card_says_and_runs_no_code_of_the_repo(prm):
    found = load_reward_model(prm)
    assert found.how.separator == "<extra_0>" and found.aggregate == "min"
    for scores, text in zip(found.score(TEXTS), TEXTS, strict=True):
        assert scores == pytest.approx(by_hand(prm, text), abs=1e-5)
    assert found.total(TEXTS) == pytest.approx([by_hand(prm, text).min() for text in TEXTS], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("score.")], "none of them"),
        (lambda w: w.pop("score.2.bias"), "a head: score.weight, or score.0 and score.2"),
        (lambda w: w.update({"score.4.weight": torch.zeros(2, 2)}), "a head: score.weight"),
        (lambda w: w.update({"score.2.weight": torch.zeros(2, 7)}), "size mismatch"),
        (lambda w: w.update({"v_head.weight": torch.zeros(1, 4)}), "v_head.weight"),
        (lambda w: w.pop("model.norm.weight"), "norm.weight"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_its_whole_head_or_backbone_is_refused(prm, tmp_path, change, message):
    shutil.copytree(prm, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=message):
        load_reward_model(tmp_path / "m")


def test_a_language_model_is_no_reward_model(quick_world):
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM, which has no head"):
        load_reward_model(quick_world.model_path)


@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
def test_classifiers_give_what_transformers_gives(quick_world, tmp_path, kind):
    import transformers

    torch.manual_seed(1)
    labels = 2 if kind == "TokenClassification" else 1
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(quick_world.model_path, num_labels=labels)
    model.config.pad_token_id = quick_world.tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")  # shards, so the head is in one of several files
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    quick_world.tokenizer.save_pretrained(tmp_path / "m")
    found = load_reward_model(tmp_path / "m")
    for text, scores in zip(TEXTS, found.score(TEXTS), strict=True):
        (row,) = tokenize(quick_world.tokenizer, [text], StepFormat())
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row.ids])).logits[0]
        if kind == "TokenClassification":
            assert scores == pytest.approx(logits.softmax(-1)[row.ends, 1].numpy(), abs=1e-5)
        else:
            assert scores[-1] == pytest.approx(float(logits[0]), abs=1e-5)
    assert found.aggregate == ("min" if labels == 2 else "last")


def test_two_tokenisations_read_the_same_steps(prm, quick_world):
    """With `<extra_0>` and without: the text of every step up to the token that is read is the same."""
    import transformers

    marked = transformers.AutoTokenizer.from_pretrained(prm)
    plain = quick_world.tokenizer
    for tokenizer, how in ((marked, StepFormat("<extra_0>")), (plain, StepFormat("\n\n", "step"))):
        for text, row in zip(TEXTS, tokenize(tokenizer, TEXTS, how), strict=True):
            assert tokenizer.decode(row.ids[: row.prompt_length]) == text.prompt
            for number, (step, end) in enumerate(zip(text.steps, row.ends, strict=True), 1):
                own = [token for token, s in zip(row.ids, row.step, strict=True) if s == number]
                assert tokenizer.decode(own) == step + how.separator
                read = tokenizer.decode([row.ids[end]])
                assert read == "<extra_0>" if how.read == "separator" else step.endswith(read)


def test_separators_and_steps_that_are_not_there_are_named(quick_world):
    tokenizer = quick_world.tokenizer
    with pytest.raises(ConfigError, match=r"'<extra_0>' is \d+ tokens of this tokenizer"):
        tokenize(tokenizer, TEXTS, StepFormat("<extra_0>"))
    with pytest.raises(DataError, match="solution 1 has no step"):
        tokenize(tokenizer, [TEXTS[0], StepText("x\n", ())], StepFormat())
    with pytest.raises(DataError, match="a step holds the separator"):
        tokenize(tokenizer, [StepText("x\n", ("1\n2",))], StepFormat())
    with pytest.raises(DataError, match="the step tokens of 1 of its 2 steps"):
        ids = tokenize(tokenizer, TEXTS[:1], StepFormat())[0].ids
        tokenize(tokenizer, TEXTS[:1], StepFormat(), max_length=len(ids) - 1)


def test_a_separator_that_melts_into_the_step_is_named(quick_world):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["so.\n"] * 9, trainers.BpeTrainer(vocab_size=258, initial_alphabet=sorted(alphabet)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    with pytest.raises(DataError, match=r"behind step 1 became part of the token '.*\.\\n'"):
        tokenize(tokenizer, [StepText("q ", ("it is so.",))], StepFormat())
    assert tokenize(tokenizer, [StepText("q ", ("it is so.",))], StepFormat(read="step"))[0].ends


def test_a_classifier_that_reads_a_pooled_state_is_refused(quick_world, tmp_path):
    """Its head is no head on the states of tokens: read as one it would score something else without a word."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(quick_world.model_path).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"classifier\."):
        load_reward_model(tmp_path)


def test_scores_that_are_not_numbers_are_refused_with_their_step(prm):
    reward = load_reward_model(prm)
    with torch.no_grad():
        reward.head[2].bias.fill_(float("nan"))
    with pytest.raises(DataError, match="the score of step 1 of solution 0 is nan"):
        reward.score(TEXTS)
    with pytest.raises(DataError, match="solution 0 has 2 steps and scores of shape"):
        CallableReward(lambda prompt, steps: [1.0]).score(TEXTS)


def test_a_probe_stands_for_the_layers_above_it(quick_world):
    """At the last layer a linear head is a probe of the normed state; read at layer L nothing above L is run."""
    tokenizer, model = quick_world.tokenizer, load_model(quick_world.model_path)
    sae = SAE.random(SAEConfig(architecture="topk", d_in=model.config.hidden_size, d_sae=64, k=8))
    texts = [StepText(f"user\n{p.question}\n", split_steps(p.answer)) for p in quick_world.train_problems[:60]]
    rows = tokenize(tokenizer, texts, StepFormat())
    scores = [np.random.default_rng(i).random(len(r.ends)) for i, r in enumerate(rows)]
    sums = RidgeSums(["score"], sae="a", group="problem")
    from hubsae.activations.capture import capture, padded
    from hubsae.core.hooks import HookPoint

    parts = [capture(model, *padded([r.ids]), [HookPoint.parse(1)])["layers.1"][r.ends] for r in rows]
    problem = np.repeat(np.arange(len(rows)), [len(p) for p in parts])
    x = torch.cat(parts)
    run_pass(x, {"a": sae}, [sums], columns={"score": np.concatenate(scores), "problem": problem})
    probe = sums.fit(alpha=1.0).probe
    reward = TruncatedReward(model, tokenizer, probe, sae=sae, hook=1)
    model.model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("a layer above the probe was run"))
    expected = probe(sae.encode_sparse(x)).numpy()
    assert np.concatenate(reward.score(texts)) == pytest.approx(expected, abs=1e-4)
    ids = [tokenizer(t.prompt, add_special_tokens=False)["input_ids"] for t in texts]
    answers = ["\n".join(t.steps) for t in texts]
    assert reward.responses(ids, answers) == pytest.approx(list(reward.total(texts)), abs=1e-4)
    with pytest.raises(ConfigError, match="64 weights, the SAE 32"):
        TruncatedReward(model, tokenizer, probe, sae=SAE.random(SAEConfig(architecture="topk", d_in=64, d_sae=32, k=2)))
