"""Cards: rendered from the record, valid for the Hub, their snippets run, a person's words survive."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsae import HubSAE, SAEConfig, push
from hubsae.core import readme
from hubsae.core.errors import ConfigError, MetadataError
from hubsae.core.metadata import Metadata, Metric
from hubsae.formats import Release, package
from hubsae.hub.card import card_of_release, guess_kind, render_card
from hubsae.hub.client import HubClient
from hubsae.hub.preview import to_html
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder

ARCHITECTURES = ["topk", "signed", "batch_topk", "batch_rule", "jumprelu", "gated", "relu", "transcoder"]


@pytest.fixture
def chain(tmp_path: Path) -> Release:
    source = seed_folder(tmp_path / "saes_k64", stages=("ppo_step116", "instruct_base", "ppo_step10"))
    release = package(source, tmp_path / "release", base_model="a/b", hook="model.layers.{layer}", license="mit",
                      training={"lr": 1e-4, "epochs": 20})  # fmt: skip
    for number, id in enumerate(release.ids):
        metadata = release.metadata(id)
        metadata.set_metrics([Metric(name="fvu", value=0.1234 + number / 1000, definition="1 - fve", n_tokens=44_574)])
        metadata.save(release.folder(id))
    return release.refresh()


def grid(tmp_path: Path) -> Release:
    release = Release.create(tmp_path / "grid", name="grid", base_model="a/b")
    for k in (4, 8):
        sae = HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=k))
        sae.metadata.hook.layer, sae.metadata.hook.module_path = 12, "model.layers.12"
        release.add(sae, f"TopK_k{k}")
    release.add_results("results", [{"k": 4, "mse": 0.02}, {"k": 8, "mse": 0.01}])
    return release


def test_the_kind_is_seen_from_the_release(chain: Release, tmp_path: Path):
    assert card_of_release(chain.path, "me/x").kind == "chain"
    assert card_of_release(grid(tmp_path).path, "me/x").kind == "grid"
    one = Release.create(tmp_path / "one", name="one", base_model="a/b")
    one.add(HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4)), "only")
    assert card_of_release(one.path, "me/x").kind == "single"
    assert guess_kind(card_of_release(chain.path, "me/x").records[:1]) == "single"


def test_a_chain_card_has_a_row_per_stage_in_training_order(chain: Release):
    text = render_card(card_of_release(chain.path, "me/x")).text
    table = text[text.index("fvu along the chain") :]
    stages = re.findall(r"^\| (instruct_base|ppo_step\d+) \|", table, re.M)[:3]
    assert stages == ["instruct_base", "ppo_step10", "ppo_step116"]
    front = readme.parse(text).front
    assert front["library_name"] == "hubsae" and front["base_model"] == "a/b" and front["license"] == "mit"


def test_no_number_that_is_not_in_the_record(chain: Release):
    card = card_of_release(chain.path, "me/x")
    text = render_card(card).text
    assert "0.1234" in text and "44,574" in text
    for metadata in (r.metadata for r in card.records):
        metadata.metrics = []
        metadata.training.lr = None
    bare = render_card(card_of_release(chain.path, "me/x"), None).text
    card.__dict__.pop("headline_metrics", None)
    card.__dict__.pop("metric_meanings", None)
    without = render_card(card).text
    assert "0.1234" in bare and "0.1234" not in without and "44,574" not in without and "0.0001" not in without
    assert "Not recorded in this release" in without and "reconstruction metrics" in without


def test_a_grid_card_shows_its_results(tmp_path: Path):
    text = render_card(card_of_release(grid(tmp_path).path, "me/x")).text
    assert "[`results/results.csv`](results/results.csv)" in text and "| 4 | 0.02 |" in text


def test_values_cannot_break_the_table(chain: Release):
    card = card_of_release(chain.path, "me/x")
    card.records[0].metadata.provenance.source_file = "a|b\n| evil <script>.pt"
    text = render_card(card).text
    assert "a\\|b \\| evil &lt;script>.pt" in text


def test_rendering_again_changes_nothing(chain: Release):
    card = card_of_release(chain.path, "me/x")
    first = render_card(card).text
    assert render_card(card, first).text == first


def test_a_persons_words_survive(chain: Release):
    card = card_of_release(chain.path, "me/x")
    first = render_card(card).text
    mine = first.replace("## Limitations", "## Limitations\n\n- Only one task, GSM8K.")
    mine = mine.replace("<!-- hubsae:begin loading", "I like layer 12 best.\n\n<!-- hubsae:begin loading")
    mine = mine.replace("license: mit", "license: apache-2.0").replace("- topk\n", "- topk\n- my-tag\n")
    start, end = mine.index("<!-- hubsae:begin citation"), mine.index("<!-- hubsae:end citation -->") + 28
    mine = mine[:start] + mine[end:]
    card.title = "A new title"
    again = render_card(card, mine)
    assert "# A new title" in again.text and "I like layer 12 best." in again.text
    assert "Only one task, GSM8K." in again.text and again.kept_by_hand == ["limitations"]
    assert "license: apache-2.0" in again.text and "- my-tag" in again.text
    assert "bibtex" not in again.text, "a block that was deleted stays deleted"
    forced = render_card(card, mine, force=True).text
    assert "Only one task" not in forced and "I like layer 12 best." in forced


def test_a_foreign_readme_gets_the_blocks_below_its_text(chain: Release):
    theirs = "---\nlicense: mit\nlibrary_name: saelens\n---\n\n# Mine\n\nWords.\n"
    text = render_card(card_of_release(chain.path, "me/x"), theirs).text
    assert text.index("Words.") < text.index("hubsae:begin summary")
    assert readme.parse(text).front["library_name"] == "hubsae"


def test_broken_front_matter_says_where():
    with pytest.raises(MetadataError, match="line 4"):
        readme.parse("---\na: 1\nb: [\n---\n")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["text\n", "# head\n", "<!-- x -->\n", "--- \n", "| a |\n", "```\n"]), max_size=6))
def test_any_text_around_blocks_is_kept(pieces: list[str]):
    first = readme.update(None, {"license": "mit"}, {"a": "one", "b": "two"}).text
    around = "".join(pieces)
    place = first.index("<!-- hubsae:begin b")
    mine = first[:place] + around + first[place:]
    again = readme.update(mine, {"license": "mit"}, {"a": "ONE", "b": "TWO"}).text
    assert around.strip("\n") in again and "ONE" in again and "TWO" in again


def test_own_template(chain: Release, tmp_path: Path):
    template = tmp_path / "mine.md.j2"
    template.write_text(
        '{% call block("hello") %}{{ card.records | length }} of mine{% endcall %}'
        '{% call block("contents") %}{% include "_partials/contents.md.j2" %}{% endcall %}'
    )
    text = render_card(card_of_release(chain.path, "me/x"), template=template).text
    assert "6 of mine" in text and "## Contents" in text and "## Loading" not in text
    template.write_text('{% call block("x") %}{{ card.nothing }}{% endcall %}')
    with pytest.raises(ConfigError, match="nothing"):
        render_card(card_of_release(chain.path, "me/x"), template=template)
    with pytest.raises(ConfigError, match="there is no card template"):
        render_card(card_of_release(chain.path, "me/x"), template=tmp_path / "none.md.j2")


def test_the_preview_runs_nothing(chain: Release):
    card = card_of_release(chain.path, "me/x")
    html = to_html(render_card(card).text + "\n<script>alert(1)</script>\n")
    assert "<script>" not in html and "<table>" in html and "<details>" in html and "hubsae:begin" not in html


# -- on the Hub --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hub_accepts_the_front_matter(hub: LocalHub, architecture: str, tmp_path: Path):
    card = render_card(card_of_release(release_of(architecture, tmp_path).path, "me/x")).text
    api = HubClient().api
    api._validate_yaml(card, repo_type="model")


def release_of(architecture: str, folder: Path) -> Release:
    options: dict = {"k": 4} if "topk" in architecture or architecture in ("signed", "batch_rule") else {}
    kind = {"signed": "topk", "batch_rule": "batch_topk", "transcoder": "topk"}.get(architecture, architecture)
    if architecture == "signed":
        options["topk_relu"] = False
    if architecture == "batch_topk":
        options["threshold"] = 0.8
    if architecture == "transcoder":
        options |= {"k": 4, "d_out": 24, "skip": True}
    sae = HubSAE.random(SAEConfig(architecture=kind, d_in=32, d_sae=64, **options))
    sae.metadata.base_model.id = "me/tiny"
    sae.metadata.hook.layer, sae.metadata.hook.module_path = 1, "model.layers.1"
    sae.metadata.hook.transformer_lens = "blocks.1.hook_resid_post"
    for name in {"W_skip"} & set(sae.tensors()):
        getattr(sae, name).data.normal_()
    release = Release.create(folder / architecture, name=architecture, base_model="me/tiny")
    release.add(sae, "sae")
    return release


def snippets_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


BARE = """
import json, sys
import torch
from hubsae import HubSAE
for repo, code in json.load(open(sys.argv[1])).items():
    scope = {}
    exec(compile(code, repo, "exec"), scope)
    assert torch.allclose(scope["x_hat"], HubSAE.from_pretrained(repo)(scope["x"]), atol=1e-5), repo
    print("ok", repo)
"""


def test_the_bare_snippets_compute_what_hubsae_does(hub: LocalHub, tmp_path: Path):
    codes = {}
    for architecture in ARCHITECTURES:
        repo = f"me/bare-{architecture}"
        push(release_of(architecture, tmp_path).path, repo, check_saelens=False)
        text = HubClient().download(repo, "README.md").read_text()
        codes[repo] = next(code for code in snippets_of(text) if "load_file" in code)
    (tmp_path / "codes.json").write_text(json.dumps(codes))
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "codes.json")],
        env=hub.env(tmp_path / "child", HF_TOKEN="hf_me"), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.count("ok ") == len(codes), done.stderr[-2000:]


@pytest.mark.slow
def test_every_snippet_of_a_card_runs_as_printed(hub: LocalHub, tmp_path: Path):
    publish_tiny_model(tmp_path / "model")
    source = seed_folder(tmp_path / "chain", (0, 1), ("instruct_base", "ppo_step10"), d_in=32)
    options = {**ABOUT, "base_model": "me/tiny", "choices": {"topk_relu": True}}
    push(source, "me/snippets", **options)
    text = HubClient().download("me/snippets", "README.md").read_text()
    codes = snippets_of(text)
    assert len(codes) == 4
    for code in codes:
        done = subprocess.run(
            [sys.executable, "-c", code], env=hub.env(tmp_path / "child", HF_TOKEN="hf_me"),
            capture_output=True, text=True, timeout=300, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"


def publish_tiny_model(folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hubsae.recipes.tiny_tokenizer import train_tokenizer

    train_tokenizer(["The answer is 42.", "Ann has 3 apples."] * 20, vocab_size=300).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    client = HubClient()
    client.ensure_repo("me/tiny")
    client.api.upload_folder(repo_id="me/tiny", folder_path=folder)


def test_metadata_sections_in_cards_are_those_of_the_schema(chain: Release):
    card = card_of_release(chain.path, "me/x")
    assert ("learning rate", "0.0001") in card.facts("training")
    assert dict(card.facts("hook"))["layer"] == "6 and 12"
    assert isinstance(card.records[0].metadata, Metadata)
