"""Labels by hand and by a chat model: kept, merged, shown on the pages, scored beside a control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hubsae.core.errors import HubSAEError
from hubsae.index import explain, labels
from hubsae.index.chat import ChatError, LocalChat
from hubsae.index.labels import Label
from hubsae.index.page import build, indexes

from . import synthetic
from .rule_model import RuleModel, served


@pytest.fixture
def index(tmp_path) -> Path:
    folder = synthetic.write(tmp_path, d_sae=600, active=150, examples=1800)
    build(tmp_path)
    return folder


def test_labels_reach_the_table_the_pages_and_the_search(index):
    before = indexes(index.parent.parent)[0]
    known = pq.read_table(index / "features.parquet")
    labels.write(index, [Label(5, "closing <b>brackets</b>", "ann", score=0.9), Label(5, "brackets", "bob")])
    assert [one.text for one in labels.read(index)] == ["closing <b>brackets</b>", "brackets"]
    summary = pq.read_table(index / "summary.parquet").to_pylist()
    assert summary[5]["label"] == "closing <b>brackets</b>"
    features = pq.ParquetFile(index / "features.parquet")
    assert features.read().drop_columns("labels").equals(known.drop_columns("labels"))
    assert [features.metadata.row_group(i).num_rows for i in range(3)] == [256, 256, 88]
    assert [one["author"] for one in features.read().to_pylist()[5]["labels"]] == ["ann", "bob"]
    after = indexes(index.parent.parent)[0]
    assert after["features_bytes"] != before["features_bytes"]
    assert f'"features_bytes": {after["features_bytes"]}' in (index.parent.parent / "index.html").read_text()


def test_a_label_of_the_same_author_takes_the_place_of_the_old_one(index):
    labels.write(index, [Label(5, "one", "ann"), Label(6, "two", "ann")])
    assert [one.text for one in labels.write(index, [Label(5, "three", "ann")])] == ["three", "two"]
    with pytest.raises(HubSAEError, match="feature 600"):
        labels.write(index, [Label(600, "beyond")])
    assert len(labels.read(index)) == 2, "nothing of a refused write is kept"


def test_csv_goes_out_and_comes_back_the_same(index, tmp_path):
    some = [Label(3, 'commas, "quotes"\nlines', "ann", "by hand", 0.5, 0.25, 0.75, 8, "2026-01-02"), Label(1, "שלום")]
    labels.write(index, some)
    sheet = tmp_path / "labels.csv"
    assert labels.to_csv(labels.read(index), sheet) == 2
    again = labels.from_csv(sheet)
    assert again[1] == some[0] and again[0].text == "שלום"
    sheet.write_text("feature,text\n1,a\nx,b\n")
    with pytest.raises(HubSAEError, match=r"labels.csv, line 3"):
        labels.from_csv(sheet)
    sheet.write_text("number,name\n1,a\n")
    with pytest.raises(HubSAEError, match="feature and text"):
        labels.from_csv(sheet)


@pytest.fixture
def model() -> RuleModel:
    return RuleModel()


OPTIONS = explain.Options(shown=4, judged=6)


def test_good_labels_score_above_their_control(index, model):
    wanted = explain.plan(index, count=12, options=OPTIONS)
    with served(model) as chat:
        found = explain.explain(index, chat, "rules", wanted, options=OPTIONS, show=False)
    scores = explain.summary(found)
    assert len(model.questions) <= wanted.calls
    assert scores["detection"]["mean"] > 0.7 > 0.6 > scores["control_detection"]["mean"]
    assert scores["fuzzing"]["mean"] > 0.7 > 0.6 > scores["control_fuzzing"]["mean"]
    one = found[0]
    assert one.detection.n == 12 and 0 <= one.detection.low <= one.detection.value <= one.detection.high <= 1
    written = {label.feature: label for label in labels.read(index)}
    assert written[one.feature].text == one.text and written[one.feature].n == 12


def test_a_run_that_was_cut_off_goes_on_and_asks_nothing_twice(index, model):
    wanted = explain.plan(index, count=6, options=OPTIONS)
    with served(model) as chat:
        whole = explain.explain(index, chat, "rules", wanted, options=OPTIONS, show=False)
        asked = len(model.questions)
        (index / explain.JOURNAL).unlink()
        model.questions.clear()
        model.fail_after = asked // 2
        with pytest.raises(ChatError, match="503"):
            explain.explain(index, chat, "rules", wanted, options=OPTIONS, show=False)
        kept = (index / explain.JOURNAL).read_text().count('"settings"')
        assert 0 < kept < 6
        with (index / explain.JOURNAL).open("a") as journal:
            journal.write('{"feature": 1, "te')  # as a crash would leave it
        model.fail_after = None
        model.questions.clear()
        again = explain.explain(index, chat, "rules", wanted, options=OPTIONS, show=False)
        assert again == whole
        judged = 3 * 2  # 12 passages and 6 with marks are three questions, under the label and under the control
        assert len(model.questions) <= asked - kept * judged
        model.questions.clear()
        explain.explain(index, chat, "rules", wanted, options=OPTIONS, show=False)
        assert model.questions == []


def test_a_model_of_transformers_answers_in_this_process(tmp_path):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}>"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_hidden_layers=1, **small))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat = LocalChat(str(tmp_path), max_tokens=4)
    question = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What?"}]
    ids = tokenizer("Be short.\nWhat?\n>", return_tensors="pt")["input_ids"]
    expected = model.eval().generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert chat(question) == chat(question) == tokenizer.decode(expected, skip_special_tokens=True) != ""


def test_answers_that_cannot_be_read_are_counted_not_guessed(index):
    random = np.random.default_rng(0)
    score = explain.judge(
        lambda messages: "I would rather not.", explain.DETECT, "x", [("a", True), ("b", False)], random
    )
    assert (score.value, score.n, score.missing) == (None, 0, 2)


def test_features_that_fire_everywhere_are_not_explained(index):
    density = pq.read_table(index / "summary.parquet", columns=["density"])["density"].to_pylist()
    often = max(range(len(density)), key=density.__getitem__)
    with pytest.raises(HubSAEError, match="more than 1%"):
        explain.plan(index, [often])
    assert explain.plan(index, [3], options=OPTIONS).calls == OPTIONS.calls
