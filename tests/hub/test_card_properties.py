"""Cards are fixed points, and nothing that a record says can leave the place it is shown at."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hubsae import HubSAE, SAEConfig, list_saes, push
from hubsae.core import readme
from hubsae.core.metadata import Metadata, Metric
from hubsae.formats import Manifest, Release, SAEEntry
from hubsae.hub.card import Card, CardOptions, Record, card_of, card_of_release, render_card
from hubsae.hub.client import HubClient
from hubsae.localhub import LocalHub

HOSTILE = [
    '"); import os; os.system("x")  #', "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</details>",
    "<!--", "<!-- hubsae:end summary -->", "<!-- hubsae:begin loading 00000000 -->",
    '<!-- hubsae:generated {"blocks": []} -->', "a|b", "```", "````python", "`", "``x", "\\", "'''", '"""', "\x1b[31m",
    "a\u202eb", "x\r\ny", "\r", "\n\n\n\n", "end\n", "---", "{{ 7*7 }}", "{% raw %}", "[x](javascript:alert(1))",
    "![x](y)", "# head", "&lt;", "\u2028", "\x85", "\x00", "~~~",
]  # fmt: skip
TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30), st.lists(st.sampled_from(HOSTILE)).map("".join))
MAYBE = st.none() | TEXT


quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def usable(path: str) -> bool:
    try:
        SAEEntry(id=path, path=path, architecture="topk", d_in=8, d_sae=16)
    except ValueError:
        return False
    return True


@st.composite
def cards(draw: st.DrawFn) -> Card:
    records, entries = [], []
    ids = draw(st.lists(TEXT.filter(usable), min_size=1, max_size=3, unique=True))
    for id in ids:
        kind = draw(st.sampled_from(["topk", "relu", "gated", "jumprelu"]))
        sae = SAEConfig(architecture=kind, d_in=8, d_sae=16, k=2 if kind == "topk" else None)
        metadata = Metadata(config=sae)
        metadata.base_model.id, metadata.base_model.revision = draw(MAYBE), draw(MAYBE)
        metadata.base_model.stage = draw(MAYBE)
        metadata.hook.layer, metadata.hook.module_path = draw(st.none() | st.integers(0, 40)), draw(MAYBE)
        metadata.training.optimizer, metadata.training.split = draw(MAYBE), draw(MAYBE)
        metadata.provenance.source_file, metadata.provenance.command = draw(MAYBE), draw(MAYBE)
        metadata.provenance.versions = draw(st.dictionaries(TEXT, TEXT, max_size=2))
        metadata.metrics = [
            Metric(name=draw(TEXT), value=0.5, definition=draw(MAYBE), scope=draw(MAYBE), source=draw(MAYBE))
            for _ in range(draw(st.integers(0, 2)))
        ]
        records.append(Record(id, id, metadata, 100, "0" * 64))
        entries.append(SAEEntry(id=id, path=id, architecture=kind, d_in=8, d_sae=16))
    manifest = Manifest(
        name="x", saes=entries, description=draw(MAYBE), license=draw(MAYBE), datasets=draw(st.lists(TEXT, max_size=2))
    )
    words = CardOptions(title=draw(MAYBE), citation=draw(MAYBE), limitations=draw(st.lists(TEXT, max_size=2)))
    return card_of(manifest, "me/x", records, Path, words)


def block(text: str, name: str) -> str:
    found = re.findall(rf"<!-- hubsae:begin {name} [0-9a-f]{{8}} -->\n(.*?)\n<!-- hubsae:end {name} -->", text, re.S)
    assert len(found) == 1, f"{len(found)} blocks {name}"
    return found[0]


def calls(code: str, name: str) -> list[list[object]]:
    """Arguments of every call of a function or method of this name; each has to be a literal."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == name:
            found.append([ast.literal_eval(a) for a in [*node.args, *(k.value for k in node.keywords)]])
    return found


@quick
@given(cards())
def test_rendering_again_changes_nothing_and_no_block_counts_as_edited(card: Card):
    first = render_card(card).text
    for held in (first, first.replace("\n", "\r\n"), first + "\n\n"):
        again = render_card(card, held)
        assert again.text == first and again.kept_by_hand == []
    card.description = "something else"
    changed = render_card(card, first)
    assert changed.kept_by_hand == [] and "something else" in block(changed.text, "summary")


@quick
@given(cards())
def test_every_snippet_parses_to_exactly_the_expected_calls(card: Card):
    loading = block(render_card(card).text, "loading")
    codes = re.findall(r"^```python\n(.*?)\n^```$", loading, re.S | re.M)
    record = card.example
    base = record.metadata.base_model
    in_model = bool(base.id and (record.metadata.hook.module_path or record.metadata.hook.transformer_lens))
    assert len(codes) == 3 + in_model
    for code in codes[:2] + codes[3:]:
        assert ["me/x", record.id] in calls(code, "from_pretrained")
    file = "sae_weights.safetensors" if record.path == "." else f"{record.path}/sae_weights.safetensors"
    assert calls(codes[2], "hf_hub_download") == [["me/x", file]]
    if in_model:
        model = [base.id, *([base.revision] if base.revision else [])]
        assert calls(codes[3], "from_pretrained") == [["me/x", record.id], model, model]
    for code in codes:
        called = {getattr(n.func, "attr", getattr(n.func, "id", "")) for n in ast.walk(ast.parse(code))
                  if isinstance(n, ast.Call)}  # fmt: skip
        assert called <= {
            "from_pretrained", "randn", "encode_sparse", "encode", "decode", "load_file", "hf_hub_download", "topk",
            "scatter_", "zeros_like", "relu", "exp", "attach", "steer", "no_grad", "model", "generate", "print",
            "tokenizer",
        }  # fmt: skip


@quick
@given(cards())
def test_no_markup_of_a_record_reaches_the_page(card: Card):
    body = readme.parse(render_card(card).text).body
    allowed = re.compile(r"(\s*(<!-- hubsae:(begin [\w-]+ [0-9a-f]{8}|end [\w-]+) -->|</?(details|summary)>[^<]*))+\s*")
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        for part in [token, *(token.children or [])]:
            if part.type in ("html_block", "html_inline"):
                assert allowed.fullmatch(part.content), part.content
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", body)


@pytest.mark.parametrize(
    "text", ["A chain.\n", "A chain.\n\n\n\nIn two parts.\n\n", "one\r\ntwo\r\n\r\n\r\nthree", "x  \ny"]
)
def test_a_description_with_blank_lines_does_not_freeze_the_card(hub: LocalHub, tmp_path: Path, text: str):
    release = Release.create(tmp_path / "release", name="r", base_model="a/b", description=text)
    release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2)), "saes/one")
    repo = f"me/description-{abs(hash(text)) % 10**8}"
    push(release.path, repo, check_saelens=False)
    assert not push(release.path, repo, check_saelens=False).committed
    release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2), seed=1), "saes/two")
    plan = push(release.path, repo, check_saelens=False).plan
    assert not [note for note in plan.notes if "edited by hand" in note]
    assert "2 sparse autoencoders" in HubClient().download(repo, "README.md", force=True).read_text()


def test_the_headline_is_of_the_tokens_that_the_sae_is_for_in_plan_card_and_list(hub: LocalHub, tmp_path: Path):
    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2))
    sae.metadata.training.exclude = ["position_0"]
    sae.metadata.metrics = [
        Metric(name=name, value=value, scope=scope, n_tokens=tokens, definition=f"what {name} is", source="hubsae")
        for name, value, scope, tokens in (
            ("fvu", 0.0017, "all", 100), ("fvu", 0.2345, "not position_0", 99), ("kl", 0.0321, "not position_0", 99),
            ("frac_recovered_mean", 0.9876, "not position_0", 99), ("l0", 31.5, "prompt", 50),
        )
    ]  # fmt: skip
    release = Release.create(tmp_path / "r", name="r", base_model="a/b")
    release.add(sae, "one")
    text = render_card(card_of_release(release.path, "me/x")).text
    contents, metrics = block(text, "contents"), block(text, "metrics")
    assert "for: `not position_0`" in contents
    assert all(number in contents for number in ("0.2345", "0.0321", "0.9876"))
    assert "0.0017" not in contents and "31.5" not in contents
    assert metrics.count("what fvu is") == 1
    assert "| `not position_0`, what this SAE is for | 99 |" in metrics and "| `all` | 100 |" in metrics
    assert text.index("hubsae:begin metrics") < text.index("hubsae:begin loading")
    result = push(release.path, "me/own-scope", check_saelens=False)
    row = result.plan.rows[0]
    assert (row.scope, row.metrics) == (
        "not position_0", {"fvu": 0.2345, "kl": 0.0321, "frac_recovered_mean": 0.9876}
    )  # fmt: skip
    assert any("(not position_0)" in line for line in result.plan.summary())
    listed = str(list_saes("me/own-scope"))
    assert "0.2345" in listed and "0.0017" not in listed


def test_the_first_plot_stands_on_top_and_features_of_an_index_are_shown(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    release = Release.create(tmp_path / "r", name="r", base_model="a/b")
    release.add(HubSAE.random(SAEConfig(architecture="topk", d_in=8, d_sae=16, k=2)), "saes/one")
    release.add_plot("a curve.png", b"\x89PNG")
    assert "features" not in readme.parse(render_card(card_of_release(release.path, "me/x")).text).memory["blocks"]
    folder = release.path / "reverse-index" / "saes--one"
    folder.mkdir(parents=True)
    features = list(range(16))
    pq.write_table(
        pa.table(
            {"feature": features, "density": [0.5 / (f + 1) for f in features], "count": [90 - f for f in features]}
        ),
        folder / "feature_metrics.parquet",
    )
    pq.write_table(
        pa.table({
            "feature": features, "kind": ["prompt"] * 16, "rank": [0] * 16, "center": [1] * 16,
            "tokens": [["<b>The", f" |answer{f}", " is"] for f in features],
        }),
        folder / "feature_prompts.parquet",
    )  # fmt: skip
    release.refresh()
    text = render_card(card_of_release(release.path, "me/x")).text
    shown = block(text, "features")
    assert text.index("](plots/a%20curve.png)") < text.index("## Contents")
    assert len(re.findall(r"^\| \d+ \|", shown, re.M)) == 5 and "&lt;b>The `\\|answer" in shown
