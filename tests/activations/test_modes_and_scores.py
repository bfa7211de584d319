"""What is fed to the model in each mode, which tokens are kept, and scores beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hubsae.activations import ActivationDataset, harvest
from hubsae.activations.rewards import ScoredText, StepScores, step_ends
from hubsae.activations.samples import Preparation, Preparer
from hubsae.activations.stream import open_stream
from hubsae.core.errors import ConfigError, DataError
from hubsae.rl.reward_models import HarvestScorer, load_reward_model


def prepare(items, first, tokenizer, how):
    return Preparer(tokenizer, how, strict=True).prepare(items, first)[0]


PAIR = {"question": "Ann has 12 apples", "answer": "She eats 3 of them"}


def rows(data: ActivationDataset):
    """Labels in the order sample, position."""
    labels = data.columns()
    order = np.lexsort([labels["position"], labels["sample_id"]])
    return {k: v[order] for k, v in labels.items()}


def text_of(tokenizer, labels, which) -> str:
    return tokenizer.decode(labels["token_id"][which])


def test_given_responses_through_the_chat_template(tmp_path, tiny_model, tokenizer):
    found = harvest(
        tiny_model, [PAIR], [1], out=tmp_path, tokenizer=tokenizer, mode="prompt+response", system="Be brief"
    )
    labels = rows(found["layers.1"])
    prompt = (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nAnn has 12 apples<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(tokenizer, labels, labels["is_prompt"]) == prompt
    assert text_of(tokenizer, labels, ~labels["is_prompt"]) == "She eats 3 of them<|im_end|>\n"
    special = [tokenizer.decode([t]) for t in labels["token_id"][labels["is_special"]]]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>", "<|im_end|>"]
    assert labels["position"].tolist() == list(range(len(labels["position"])))


@pytest.mark.parametrize("select", ["prompt", "response"])
def test_only_prompt_or_response_tokens(tmp_path, tiny_model, tokenizer, select):
    every = harvest(
        tiny_model, [PAIR], [1], out=tmp_path / "a", tokenizer=tokenizer, mode="prompt+response", dtype="float32"
    )
    some = harvest(
        tiny_model,
        [PAIR],
        [1],
        out=tmp_path / "b",
        tokenizer=tokenizer,
        mode="prompt+response",
        dtype="float32",
        select=select,
    )
    keep = every["layers.1"].columns("is_prompt")["is_prompt"] == (select == "prompt")
    assert torch.equal(every["layers.1"].read_all()[torch.from_numpy(keep)], some["layers.1"].read_all())
    # positions are those in the whole sequence
    assert some["layers.1"].columns("position")["position"].tolist() == np.flatnonzero(keep).tolist()


def test_prompts_alone_and_raw_text(tokenizer):
    how = Preparation("prompt")
    chat = prepare([PAIR], 0, tokenizer, how)[0]
    assert tokenizer.decode(chat.ids).endswith("<|im_start|>assistant\n") and chat.prompt_length == len(chat.ids)
    raw = prepare([PAIR], 0, tokenizer, Preparation("text"))[0]
    assert tokenizer.decode(raw.ids) == PAIR["question"] and raw.prompt_length == 0
    joined = prepare([("2+2=", "4")], 0, tokenizer, Preparation("prompt+response", chat=False))[0]
    assert tokenizer.decode(joined.ids) == "2+2=4"
    assert tokenizer.decode(joined.ids[: joined.prompt_length]) == "2+2="


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]},
        {"conversations": [{"from": "user", "value": "a b"}, {"from": "assistant", "value": "c d"}]},
        {"prompt": "a b", "response": "c d"},
        {"prompt": [{"role": "user", "content": "a b"}], "completion": [{"role": "assistant", "content": "c d"}]},
        {"problem": "a b", "solution": "c d", "other": 1},
        ("a b", "c d"),
        [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    ],
)
def test_shapes_of_data(tokenizer, item):
    sample = prepare([item], 4, tokenizer, Preparation("prompt+response"))[0]
    assert sample.id == 4
    assert tokenizer.decode(sample.ids[sample.prompt_length :]) == "c d<|im_end|>\n"


def test_a_prompt_whose_tokens_merge_with_the_response(tokenizer):
    """The whole is tokenised at once; a token that begins in the prompt belongs to it."""
    sample = prepare([("Ann ha", "s 12 apples")], 0, tokenizer, Preparation("prompt+response", chat=False))[0]
    assert sample.ids == tokenizer("Ann has 12 apples")["input_ids"]
    assert len(tokenizer.decode(sample.ids[: sample.prompt_length])) >= len("Ann ha")


def test_a_tokenizer_without_chat_template(tiny_model, tokenizer, tmp_path):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template(.|\n)*--raw"):
        harvest(tiny_model, [PAIR], [1], out=tmp_path, tokenizer=bare, mode="prompt+response")
    harvest(tiny_model, [PAIR], [1], out=tmp_path, tokenizer=bare, mode="prompt+response", chat=False)


def test_columns_that_are_not_there(tokenizer):
    with pytest.raises(DataError, match=r"cannot tell which column holds the prompt(.|\n)*its columns are x, y"):
        prepare([{"x": "a", "y": "b"}], 0, tokenizer, Preparation("prompt+response"))
    with pytest.raises(DataError, match="no column 'z'"):
        prepare([PAIR], 0, tokenizer, Preparation("prompt+response", response_column="z"))
    with pytest.raises(DataError, match="has no response"):
        prepare(["only a question"], 0, tokenizer, Preparation("prompt+response"))


def test_truncation_and_empty_samples_are_on_record(tmp_path, tiny_model, tokenizer):
    texts = ["Ann has 12 apples and eats 3 of them", "Ann", ""]
    found = harvest(tiny_model, texts, [1], out=tmp_path, tokenizer=tokenizer, max_length=4)
    labels = rows(found["layers.1"])
    assert (labels["truncated"] == (labels["sample_id"] == 0)).all()
    assert np.bincount(labels["sample_id"]).tolist() == [4, len(tokenizer("Ann")["input_ids"])]
    manifest = json.loads((tmp_path / "activations.json").read_text())
    assert manifest["configs"]["layers.1"]["splits"]["train"]["truncated"] == 1
    assert manifest["run"]["run"]["empty"] == 1
    card = (tmp_path / "README.md").read_text()
    assert "2 samples, of which 1 were longer" in card and "1 samples had no token to keep" in card


def test_max_tokens_stops_with_the_sample_that_reaches_it(tmp_path, tiny_model, token_data):
    lengths = np.cumsum([len(s["input_ids"]) for s in token_data])
    expected = int(lengths[np.searchsorted(lengths, 500)])
    for world in (1, 2):
        for rank in range(world):
            harvest(
                tiny_model,
                token_data,
                [1],
                out=tmp_path / str(world),
                max_tokens=500,
                window=16,
                rank=rank,
                world_size=world,
            )
        assert len(ActivationDataset.open(tmp_path / str(world))) == expected


def test_packed_blocks(tmp_path, tiny_model, tokenizer):
    texts = [f"Ann has {n} apples and eats {n % 7} of them" for n in range(60)]
    found = harvest(tiny_model, texts, [1], out=tmp_path, tokenizer=tokenizer, mode="packed", max_length=32)
    labels = rows(found["layers.1"])
    stream = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert labels["token_id"].tolist() == stream
    assert np.bincount(labels["sample_id"])[:-1].tolist() == [32] * (len(stream) // 32)


@pytest.mark.parametrize("separate", [True, False])
def test_packed_blocks_hold_every_token_of_the_texts_once_and_in_order(tiny_model, tokenizer, separate):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, len(tokenizer), rng.integers(1, 90)).tolist() for _ in range(200)]
    options = {"tokenizer": tokenizer, "mode": "packed", "max_length": 48, "batch_tokens": 480, "window": 7}
    stream = open_stream(tiny_model, [1], separate=separate, **options)
    parts = [batch.labels for batch in stream.batches(texts)]
    labels = {name: np.concatenate([part[name] for part in parts]) for name in ("token_id", "sample_id", "position")}
    order = np.lexsort([labels["position"], labels["sample_id"]])
    between = [tokenizer.eos_token_id] if separate else []
    assert labels["token_id"][order].tolist() == [i for text in texts for i in [*text, *between]]
    assert set(np.bincount(labels["sample_id"])[:-1].tolist()) == {48}
    # each token once: no (block, position) comes twice
    assert len(np.unique(np.stack([labels["sample_id"], labels["position"]]), axis=1)[0]) == len(order)


def test_generated_responses_end_at_the_first_end_token(tmp_path, tiny_model, tokenizer):
    data = [PAIR, {"question": "Ann"}, {"question": "apples and apples"}]
    options = {"tokenizer": tokenizer, "mode": "generate", "generation": {"max_new_tokens": 9}, "dtype": "float32"}
    found = harvest(tiny_model, data, [1, 3], out=tmp_path / "a", seed=1, **options)
    labels = rows(found["layers.1"])
    for sample in range(3):
        mine = labels["sample_id"] == sample
        prompt = labels["token_id"][mine & labels["is_prompt"]].tolist()
        assert prompt == prepare([data[sample]], 0, tokenizer, Preparation("prompt"))[0].ids
        response = labels["token_id"][mine & ~labels["is_prompt"]].tolist()
        assert 1 <= len(response) <= 9
        assert tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 9 or response[-1] == tokenizer.eos_token_id
        # harvested by one forward over the whole, not step by step
        with torch.no_grad():
            states = tiny_model.model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
        x = found["layers.1"].read_all()[
            torch.from_numpy(found["layers.1"].columns("sample_id")["sample_id"] == sample)
        ]
        assert torch.allclose(x, states[2][0], atol=1e-5)
    again = harvest(tiny_model, data, [1], out=tmp_path / "b", seed=1, **options)
    assert np.array_equal(rows(again["layers.1"])["token_id"], labels["token_id"])
    other = harvest(tiny_model, data, [1], out=tmp_path / "c", seed=2, **options)
    assert not np.array_equal(rows(other["layers.1"])["token_id"], labels["token_id"])
    # an end token that every answer contains early
    tiny_model.generation_config.eos_token_id = list(range(100, 200))
    try:
        short = harvest(tiny_model, data, [1], out=tmp_path / "d", seed=1, **options)
    finally:
        tiny_model.generation_config.eos_token_id = None
    assert len(short["layers.1"]) < len(found["layers.1"])


def test_greedy_generation_equals_the_models_own(tmp_path, tiny_model, tokenizer):
    found = harvest(
        tiny_model, [PAIR], [1], out=tmp_path, tokenizer=tokenizer, mode="generate",
        generation={"max_new_tokens": 6, "do_sample": False},
    )  # fmt: skip
    prompt = prepare([PAIR], 0, tokenizer, Preparation("prompt"))[0].ids
    expected = tiny_model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )
    assert rows(found["layers.1"])["token_id"].tolist() == expected[0].tolist()


def test_an_option_of_generation_that_does_not_exist_is_named(tmp_path, tiny_model, tokenizer):
    with pytest.raises(ConfigError, match="generation has no option 'max_new_token'") as caught:
        harvest(
            tiny_model, [PAIR], [1], out=tmp_path, tokenizer=tokenizer, mode="generate",
            generation={"max_new_token": 6, "do_sample": False},
        )  # fmt: skip
    assert "nearest: max_new_tokens" in str(caught.value)


def test_scores_of_samples_and_steps_become_columns(tmp_path, tiny_model, tokenizer):
    def steps(text):
        ends = [text.prompt_length + 1, len(text.ids) - 2]
        return StepScores(ends, [0.25, 0.75], start=text.prompt_length)

    seen = []

    def length(text):
        seen.append((text.prompt, text.response, text.item["gold"]))
        return len(text.response)

    data = [{**PAIR, "gold": 7}, {"question": "Ann", "answer": "12 apples", "gold": 8}]
    found = harvest(
        tiny_model, data, [1], out=tmp_path, tokenizer=tokenizer, mode="prompt+response",
        scorers={"reward": length, "step": steps, "none": lambda text: None,
                 "token": lambda text: list(range(len(text.ids)))},
        columns={"gold": "int64"},
    )  # fmt: skip
    labels = rows(found["layers.1"])
    assert ("user\nAnn\nassistant\n", "12 apples\n", 8) in seen
    for sample, item in enumerate(data):
        mine = labels["sample_id"] == sample
        assert set(labels["reward"][mine].tolist()) == {len(item["answer"]) + 1}
        assert set(labels["gold"][mine].tolist()) == {item["gold"]}
        assert labels["token"][mine].tolist() == labels["position"][mine].tolist()
        step = labels["step"][mine]
        response = ~labels["is_prompt"][mine]
        assert np.isnan(step[~response]).all() and np.isnan(step[-1]) and np.isnan(labels["none"]).all()
        assert step[response][:2].tolist() == [0.25, 0.25] and set(step[response][2:-1].tolist()) == {0.75}


def test_a_scorer_that_answers_nonsense(tmp_path, tiny_model, tokenizer):
    with pytest.raises(DataError, match=r"scorer reward, sample 0: expected one score or"):
        harvest(
            tiny_model, [PAIR], [1], out=tmp_path, tokenizer=tokenizer, mode="prompt+response",
            scorers={"reward": lambda text: [1.0, 2.0]},
        )  # fmt: skip


def classifier(tokenizer, folder, kind: str, labels: int):
    import transformers

    torch.manual_seed(2)
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = getattr(transformers, f"Qwen2For{kind}Classification")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_sequence_classifier_as_scorer(tmp_path, tiny_model, tokenizer):
    model = classifier(tokenizer, tmp_path / "rm", "Sequence", 1)
    scorer = HarvestScorer(load_reward_model(tmp_path / "rm"))
    data = [PAIR, {"question": "Ann", "answer": "3"}]
    found = harvest(
        tiny_model,
        data,
        [1],
        out=tmp_path / "o",
        tokenizer=tokenizer,
        mode="prompt+response",
        scorers={"reward": scorer},
    )
    labels = rows(found["layers.1"])
    for sample in range(2):
        mine = labels["sample_id"] == sample
        with torch.no_grad():
            expected = model(torch.from_numpy(labels["token_id"][mine]).long()[None]).logits.item()
        assert labels["reward"][mine] == pytest.approx(expected, abs=1e-5)


def test_a_token_classifier_scores_steps(tmp_path, tokenizer):
    model = classifier(tokenizer, tmp_path / "prm", "Token", 2)
    scorer = HarvestScorer(load_reward_model(tmp_path / "prm"), "\n")
    sample = prepare([("Ann", "12 apples\nand 3\nof")], 0, tokenizer, Preparation("prompt+response", chat=False))[0]
    ends = step_ends(sample.ids, sample.prompt_length, "\n", tokenizer)
    assert len(ends) == 3 and ends[-1] == len(sample.ids) - 1
    scores = scorer(ScoredText(None, sample.ids, sample.prompt_length, "", ""))
    with torch.no_grad():
        expected = model(torch.tensor([sample.ids])).logits[0, ends].softmax(-1)[:, 1]
    assert scores.scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_classifier_whose_head_is_missing_is_refused(tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match="has no head that scores"):
        load_reward_model(tmp_path / "lm")
