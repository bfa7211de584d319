"""Leave out texts that share a run of words with an earlier one, in a stream of any length and a fixed memory.

    chat -> words of all turns -> a 64-bit hash of every run of n words -> seen before? -> skipped, else kept and noted

The hashes lie in a Bloom filter: what was seen is always found, and something new is taken for seen with a probability
that `chance` says (with 64 bits of memory per noted hash, 4e-8). So the memory says how many texts can be told apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hubsae.activations.splits import GOLDEN, mixed
from hubsae.core.errors import ConfigError
from hubsae.core.text import MESSAGE_KEYS, TEXT_KEYS

PROBES = 8
"""Bits of the filter per hash."""
BASE = np.uint64(GOLDEN)
WORDS = 1 << 20
"""Words whose hashes are remembered; the memory of the words is bounded too."""


class Deduplicator:
    """Tells texts that share `n` consecutive words with one it kept; a text of fewer words shares none.

    >>> seen = Deduplicator(n=3, megabytes=1)
    >>> [seen.keep(text) for text in ("a b c d", "x b c d", "b c x d", "a b")]
    [True, False, True, True]
    """

    def __init__(self, n: int = 20, *, megabytes: float = 64):
        if n < 1:
            raise ConfigError(f"runs of {n} words cannot be compared", hint="n is at least 1; 20 is usual")
        self.n, self.bits = n, np.zeros(max(64, int(megabytes * 2**20)), np.uint8)
        self.kept, self.skipped, self.noted = 0, 0, 0
        self._words: dict[str, int] = {}

    def keep(self, text: str) -> bool:
        """Whether none of its runs of words was in a text kept before; if so they are noted."""
        grams = np.unique(self.hashes(text))
        places = self._places(grams)
        if bool(self._set(places).all(1).any()):
            self.skipped += 1
            return False
        self.kept, self.noted = self.kept + 1, self.noted + len(grams)
        flat = places.reshape(-1)
        np.bitwise_or.at(self.bits, flat >> np.uint64(3), _bit(flat))
        return True

    def filter(self, items: Iterable[Any]) -> Iterator[Any]:
        """Those of a stream of texts, or rows with a text or messages, that are kept."""
        return (item for item in items if self.keep(words_of(item)))

    def hashes(self, text: str) -> np.ndarray:
        """A hash of each run of n words [words - n + 1] uint64, the same on every machine."""
        words = np.array([self._word(word) for word in text.split()], np.uint64)
        count = max(0, len(words) - self.n + 1)
        found = np.zeros(count, np.uint64)
        with np.errstate(over="ignore"):
            for j in range(self.n):
                found = found * BASE + words[j : j + count]
        return mixed(found)

    @property
    def chance(self) -> float:
        """How likely a run of words that was never noted is taken for seen, from the share of bits that are set."""
        share = int(np.unpackbits(self.bits).sum(dtype=np.int64)) / (8 * len(self.bits))
        return share**PROBES

    def _word(self, word: str) -> int:
        if word not in self._words:
            if len(self._words) >= WORDS:
                self._words.clear()
            self._words[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return self._words[word]

    def _places(self, grams: np.ndarray) -> np.ndarray:
        """The bits that stand for each hash [hashes, PROBES]."""
        with np.errstate(over="ignore"):
            steps = np.arange(PROBES, dtype=np.uint64) * (mixed(grams)[:, None] | np.uint64(1))
            return (grams[:, None] + steps) % np.uint64(8 * len(self.bits))

    def _set(self, places: np.ndarray) -> np.ndarray:
        return (self.bits[places >> np.uint64(3)] & _bit(places)) != 0


def words_of(item: Any) -> str:
    """The text of a row: its own, or the turns of its conversation one after another.

    >>> words_of({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]})
    'Hi Yes.'
    """
    if isinstance(item, str):
        return item
    turns = next((item[key] for key in MESSAGE_KEYS if key in item), None) if isinstance(item, Mapping) else item
    if turns is not None:
        return " ".join(str(turn.get("content", turn.get("value")) or "") for turn in turns)
    return str(next((item[key] for key in TEXT_KEYS if key in item), ""))


def _bit(places: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))
