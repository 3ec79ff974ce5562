"""Text or ids -> think and answer, as they arrive. Total: nothing a model writes makes the splitter raise.

The splitter takes one symbol at a time (a character, or a token id), so that a stream splits like the whole text,
whatever its chunks. A begun tag is held back until it is complete or broken, and flushed at the end. It fails closed:
an unclosed think block yields no answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from gnomon.base.errors import DataError
from gnomon.protocol.graph import from_text
from gnomon.protocol.layout import Layout
from gnomon.protocol.match import Matcher, matcher
from gnomon.protocol.tags import ANSWER, END_ANSWER, END_THINK, KIND_GROUP, PLAN, TAGS, THINK

Place = Literal["outside", "think", "answer"]
S = TypeVar("S", bound=Hashable)


class Piece(NamedTuple):
    """Symbols that belong to one place. `data` is a str in text mode, a tuple of ids in token mode."""

    place: Place
    data: Any


@dataclass(frozen=True)
class Split:
    """A whole completion, split. truncated: a block was still open at the end, so `answer` may not be trusted.

    Where the think block never closed, `answer` is empty whatever followed.
    """

    think: Any
    answer: Any
    outside: Any
    truncated: bool
    blocks: int


class Splitter(Generic[S]):
    """The incremental automaton. Use `text_splitter` or `token_splitter`.

    bare: everything behind the think block is the answer, with or without an answer tag (foreign bases).
    """

    def __init__(
        self,
        think: Sequence[Sequence[S]],
        end_think: Sequence[Sequence[S]],
        answer: Sequence[Sequence[S]],
        end_answer: Sequence[Sequence[S]],
        plans: Sequence[Sequence[S]] = (),
        start: Place = "outside",
        bare: bool = False,
        as_text: bool = True,
    ) -> None:
        opening: list[tuple[Any, Place | None]] = [(tag, "think") for tag in think]
        ending: list[tuple[Any, Place | None]] = [(tag, None) for tag in (*end_think, *end_answer)]
        plain: list[tuple[Any, Place | None]] = [(tag, None) for tag in plans]
        # Per place: the tags that mean something there, and where each leads (None: it is only swallowed).
        after: Place = "answer" if bare else "outside"
        self._rules: dict[Place, tuple[Matcher, list[Place | None]]] = {
            "outside": _rule([*opening, *((tag, "answer") for tag in answer), *ending, *plain]),
            "think": _rule([(tag, after) for tag in end_think]),
            "answer": _rule(
                [*opening, *((tag, "outside") for tag in end_answer), *((t, None) for t in (*answer, *end_think))]
            ),
        }
        self._bare, self._as_text = bare, as_text
        self.place: Place = start
        self.blocks = 1 if start == "think" else 0
        self._back: Place = after
        self._state = 0
        self._held: list[S] = []

    def feed(self, symbols: Iterable[S]) -> list[Piece]:
        """The pieces that are certain after these symbols, adjacent ones of one place joined."""
        out: list[tuple[Place, list[S]]] = []
        for symbol in symbols:
            self._one(symbol, out)
        return self._pieces(out)

    def close(self) -> list[Piece]:
        """The end: a begun tag is flushed as what it is, ordinary text of its place."""
        held, self._held, self._state = self._held, [], 0
        return self._pieces([(self.place, held)] if held else [])

    @property
    def truncated(self) -> bool:
        """Whether a block is open here."""
        return self.place == "think" or (self.place == "answer" and not self._bare)

    def _one(self, symbol: S, out: list[tuple[Place, list[S]]]) -> None:
        rule, leads = self._rules[self.place]
        self._held.append(symbol)
        self._state = rule.step(self._state, symbol)
        hit = rule.hit[self._state]
        free = len(self._held) - (rule.depth[self._state] if hit is None else hit[1])
        if free:
            if out and out[-1][0] == self.place:
                out[-1][1].extend(self._held[:free])
            else:
                out.append((self.place, self._held[:free]))
            del self._held[:free]
        if hit is not None:
            self._held.clear()
            self._state = 0
            self._move(leads[hit[0]])

    def _move(self, place: Place | None) -> None:
        if place is None:
            return
        if place == "think":
            self.blocks += 1
            self._back = self.place if self.place == "answer" else ("answer" if self._bare else "outside")
        elif self.place == "think":
            place = self._back
        self.place = place

    def _pieces(self, out: list[tuple[Place, list[S]]]) -> list[Piece]:
        if self._as_text:
            return [Piece(place, "".join(map(str, data))) for place, data in out]
        return [Piece(place, tuple(data)) for place, data in out]


def _rule(tags: list[tuple[Any, Place | None]]) -> tuple[Matcher, list[Place | None]]:
    tags = [(tag, place) for tag, place in tags if len(tag)]
    return matcher(*(tuple(tag) for tag, _ in tags)), [place for _, place in tags]


def text_splitter(start: Place = "outside", bare: bool = False) -> Splitter[str]:
    """Splits text by the literal tags. start: where the text begins ("think" where the template opened the block)."""
    return Splitter([THINK], [END_THINK], [ANSWER], [END_ANSWER], list(PLAN.values()), start, bare)


def token_splitter(layout: Layout, start: Place = "outside", bare: bool = False) -> Splitter[int]:
    """Splits ids by the tags of a layout."""
    return Splitter(
        [layout.think],
        [layout.end_think, *layout.end_think_also],
        [layout.answer],
        [layout.end_answer],
        list(layout.plans.values()),
        start,
        bare,
        as_text=False,
    )


def split(symbols: Any, splitter: Splitter[Any]) -> Split:
    """A whole text or id sequence at once; `splitter` must be fresh."""
    pieces = splitter.feed(symbols) + splitter.close()
    return collect(pieces, splitter)


def collect(pieces: Sequence[Piece], splitter: Splitter[Any]) -> Split:
    """All pieces of a finished splitter as one record."""
    parts: dict[str, Any] = {}
    for place in ("think", "answer", "outside"):
        data = [piece.data for piece in pieces if piece.place == place]
        parts[place] = "".join(data) if splitter._as_text else tuple(x for d in data for x in d)
    if splitter.place == "think":
        parts["answer"] = "" if splitter._as_text else ()
    return Split(truncated=splitter.truncated, blocks=splitter.blocks, **parts)


class Span(NamedTuple):
    """Characters [start, end)."""

    start: int
    end: int


class NodeSpan(NamedTuple):
    """One node line of the think block: its kind and its characters."""

    kind: str
    span: Span


@dataclass(frozen=True)
class Segments:
    """A training record: prompt, think and answer (inside the tags) as spans of `text`, and its nodes."""

    text: str
    prompt: Span
    think: Span
    answer: Span
    strategy: str | None
    nodes: tuple[NodeSpan, ...]

    def mask(self, name: str) -> list[bool]:
        """One flag per character: "prompt", "think", "answer", a group ("plan", "exec", "eval") or a kind ("S")."""
        if name in ("prompt", "think", "answer"):
            spans = [getattr(self, name)]
        else:
            spans = [n.span for n in self.nodes if name in (n.kind, KIND_GROUP[n.kind])]
            if name not in KIND_GROUP and name not in KIND_GROUP.values():
                raise DataError(f"no mask {name!r}; write prompt, think, answer, plan, exec, eval or a node kind")
        flags = [False] * len(self.text)
        for start, end in spans:
            flags[start:end] = [True] * (end - start)
        return flags


def segment(text: str, number: int = 1) -> Segments:
    """Text with exactly one think block followed by exactly one answer -> Segments.

    Raises DataError naming the record `number` and the reason.
    """

    def refuse(reason: str) -> DataError:
        return DataError(f"record {number}: {reason}; a record is a prompt, {THINK}…{END_THINK}, {ANSWER}…{END_ANSWER}")

    at: dict[str, int] = {}
    for tag in (THINK, END_THINK, ANSWER, END_ANSWER):
        count = text.count(tag)
        if count != 1:
            raise refuse(f"{tag} occurs {count} times" if count else f"{tag} is missing")
        at[tag] = text.index(tag)
    if not at[THINK] < at[END_THINK] < at[ANSWER] < at[END_ANSWER]:
        order = " ".join(sorted(at, key=at.__getitem__))
        raise refuse(f"the tags stand in the order {order}")
    between = text[at[END_THINK] + len(END_THINK) : at[ANSWER]]
    if between.strip():
        raise refuse(f"text between the blocks: {between.strip()[:40]!r}")
    tail = text[at[END_ANSWER] + len(END_ANSWER) :]
    if tail.strip():
        raise refuse(f"text behind the answer: {tail.strip()[:40]!r}")
    plans = [(text.index(tag), name) for name, tag in PLAN.items() if tag in text]
    if len(plans) > 1 or any(text.count(PLAN[name]) > 1 for _, name in plans):
        raise refuse("more than one strategy tag")
    head = at[THINK]
    strategy = None
    if plans:
        head, strategy = plans[0]
        if text[head + len(PLAN[strategy]) : at[THINK]].strip():
            raise refuse(f"the strategy tag must stand directly before {THINK}")
    think = Span(at[THINK] + len(THINK), at[END_THINK])
    answer = Span(at[ANSWER] + len(ANSWER), at[END_ANSWER])
    return Segments(text, Span(0, head), think, answer, strategy, _nodes(text, think))


def _nodes(text: str, think: Span) -> tuple[NodeSpan, ...]:
    """The node lines of the block; lines that are no nodes are left out (they are lint, not errors)."""
    nodes, start = [], think.start
    for line in text[think.start : think.end].split("\n"):
        parsed = from_text(line).nodes
        if parsed:
            nodes.append(NodeSpan(parsed[0].kind, Span(start, start + len(line))))
        start += len(line) + 1
    return tuple(nodes)


def has_tags(text: str) -> bool:
    """Whether text spells a tag; such text is encoded as ordinary pieces and never opens or closes a block."""
    return any(tag in text for tag in TAGS)
