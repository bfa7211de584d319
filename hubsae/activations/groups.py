"""Groups of tokens in a chat: whose turn it is, and what is content and what belongs to the template.

    <|im_start|>user\\n Hi <|im_end|>\\n <|im_start|>assistant\\n Yes. <|im_end|>\\n
    template    turn 0  |  content  |   template   turn 1         ...

Nothing is known of any particular template. It is rendered once per sequence of roles with a mark in place of each
content; what lies between the marks is the template's own. Rendering the first n messages alone tells where turn n
begins. The real text is then walked along that skeleton.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLUMNS = {"role": "string", "turn": "int32", "is_template": "bool", "is_assistant": "bool"}
"""Label columns of chats beside `is_special`. `turn` is the number of the message, -1 in front of the first;
`is_assistant` is what the assistant says in any of its turns, up to and with the end of the turn."""


def no_groups(rows: int) -> dict[str, np.ndarray]:
    """The labels of `rows` tokens of which nothing is known."""
    found = {"role": np.full(rows, "", dtype=object), "turn": np.full(rows, -1, dtype=np.int32)}
    return found | {name: np.zeros(rows, dtype=bool) for name in ("is_template", "is_assistant")}


Key = tuple[tuple[str, ...], bool]


class Piece(NamedTuple):
    """A stretch of the rendered text."""

    text: str | None
    """None for content."""
    turn: int
    role: str
    template: bool
    assistant: bool


class ChatLayout:
    """How a tokenizer's template lays out chats; skeletons are kept, since most chats share a few.

    >>> class Template:
    ...     chat_template = "yes"
    ...     def apply_chat_template(self, messages, **_):
    ...         return "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
    >>> chat, spans = [{"role": "user", "content": "Hi"}], [(0, 6), (6, 8), (8, 11)]
    >>> groups = ChatLayout(Template()).label(chat, "<user>Hi</>", spans)
    >>> groups["is_template"].tolist(), groups["role"].tolist()
    ([True, False, True], ['user', 'user', 'user'])
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self.known: dict[Key, tuple[list[Piece], dict[str, np.ndarray]]] = {}

    def label(
        self, messages: Sequence[Mapping[str, str]], text: str, offsets: Sequence[tuple[int, int]], *, ask: bool = False
    ) -> dict[str, np.ndarray] | None:
        """Labels [tokens] of a rendered chat whose tokens span `offsets`; `ask`: it ends where the answer begins.

        A token belongs where it begins. None where the text does not follow the skeleton.
        """
        key = tuple(m["role"] for m in messages), ask
        if key not in self.known:
            pieces = self._skeleton(*key)
            columns = {
                "role": np.array([p.role for p in pieces], dtype=object),
                "turn": np.array([p.turn for p in pieces], dtype=np.int32),
                "is_template": np.array([p.template for p in pieces]),
                "is_assistant": np.array([p.assistant for p in pieces]),
            }
            self.known[key] = pieces, columns
        pieces, columns = self.known[key]
        ends = _walk(pieces, [m["content"] for m in messages], text)
        if ends is None:
            return None
        starts = np.array([start for start, _ in offsets], dtype=np.int64)
        which = np.minimum(np.searchsorted(np.array(ends), starts, side="right"), len(pieces) - 1)
        return {name: column[which] for name, column in columns.items()}

    def _render(self, roles: Sequence[str], ask: bool) -> str:
        messages = [{"role": role, "content": _mark(number)} for number, role in enumerate(roles)]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **self.options)

    def _skeleton(self, roles: tuple[str, ...], ask: bool) -> list[Piece]:
        whole = self._render(roles, ask)
        edges = [0, *(self._edge(whole, roles[:n]) for n in range(1, len(roles) + 1))]
        marks = sorted((at, n) for n in range(len(roles)) if (at := whole.find(_mark(n))) >= 0)
        pieces, here, last = [], 0, -1
        for at, number in marks:
            if here == 0 and last < 0 and roles[0] != "system":
                pieces += self._front(whole[:at], roles, ask)
            else:
                pieces += _between(whole[here:at], here, last, number, edges, roles)
            pieces.append(Piece(None, number, roles[number], False, roles[number] == "assistant"))
            here, last = at + len(_mark(number)), number
        # behind the last content: its turn ends; an answer that is asked for has begun
        pieces += _between(whole[here:], here, last, len(roles), edges, (*roles, "assistant"))
        return pieces

    def _edge(self, whole: str, roles: Sequence[str]) -> int | None:
        """Where the turn behind `roles` begins, if the template renders them alone as it does at the front."""
        try:
            part = self._render(roles, False)
        except Exception:  # a template may refuse this many messages; it says so in its own words
            return None
        return len(part) if whole.startswith(part) else None

    def _front(self, text: str, roles: Sequence[str], ask: bool) -> list[Piece]:
        """What stands before the first content; a system prompt that the template adds by itself is content."""
        try:
            with_system = self._render(("system", *roles), ask)
        except Exception:  # no system role here
            with_system = ""
        before, mark, rest = with_system.partition(_mark(0))
        after = rest.partition(_mark(1))[0]
        if mark and len(before) + len(after) < len(text) and text.startswith(before) and text.endswith(after):
            added = text[len(before) : len(text) - len(after)]
            # behind the added system prompt its turn ends; where the first one begins, the same template says
            close = _edge_of(after, roles[0])
            return [
                Piece(before, -1, "system", True, False),
                Piece(added, -1, "system", False, False),
                Piece(after[:close], -1, "system", True, False),
                Piece(after[close:], 0, roles[0], True, False),
            ]
        return [Piece(text, 0, roles[0], True, False)]


def _edge_of(text: str, role: str) -> int:
    """Where a turn's head begins in what ends one turn and opens another: at the last delimiter before the role."""
    named = text.rfind(role)
    delimiter = text.rfind("<", 0, named) if named > 0 else -1
    return delimiter if delimiter > 0 else 0


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _between(
    text: str, start: int, last: int, following: int, edges: Sequence[int | None], roles: Sequence[str]
) -> list[Piece]:
    """Template text between two contents: the end of one turn and the head of the next."""
    if not text:
        return []
    edge = edges[following] if 0 <= following < len(edges) else None
    if last < 0:
        edge = start
    at = len(text) if edge is None and following >= len(roles) - 1 else min(max((edge or 0) - start, 0), len(text))
    role = roles[last] if last >= 0 else ""
    close = Piece(text[:at], last, role, True, role == "assistant")
    head = Piece(text[at:], following, roles[min(following, len(roles) - 1)], True, False)
    return [piece for piece in (close, head) if piece.text]


def _walk(pieces: Sequence[Piece], contents: Sequence[str], text: str) -> list[int] | None:
    """Where each piece ends in the real text, or None where it does not fit."""
    at, ends = 0, []
    for number, piece in enumerate(pieces):
        if piece.text is not None:
            if not text.startswith(piece.text, at):
                return None
            at += len(piece.text)
        else:
            own = itertools.takewhile(lambda p: p.text is not None, pieces[number + 1 :])
            behind = "".join(p.text or "" for p in own)
            content = contents[piece.turn]
            said = (content, content.strip(), content.lstrip(), content.rstrip())
            for form in said:
                stop = at + len(form)
                if text.startswith(form, at) and (text.startswith(behind, stop) if behind else True):
                    break
            else:  # the template changed the content (dropped a thought, say): up to its next own words
                stop = text.find(behind, at) if behind else len(text)
                if stop < 0:
                    return None
            at = stop
        ends.append(at)
    return ends
