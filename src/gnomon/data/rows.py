"""Rows of other people's data sets as records of the protocol.

Three forms: `messages` (a record per assistant turn, its thought in `reasoning_content` or a think block), `prompt` +
`completion` (the thought in a think block or a column of its own), and `text` (no thought, no question).

A thought without grammar becomes steps: each of its lines that is not blank is one `S` node behind the one before
(token mode has no newlines; `foreign.py` reads a base's free text the same way). Its strategy is `steps`, an absent
thought is `direct`; a strategy tag in front of the think block wins. The plan tag has loss 0 (decisions.md §1).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from gnomon.base.errors import ConfigError, nearest, unknown
from gnomon.data.encode import Encoded, encode_record
from gnomon.data.ingest import MAX_MESSAGES, MAX_ROW_BYTES, BadRow, clean, spells_tag
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.graph import Node, from_text
from gnomon.protocol.tags import ANSWER, END_ANSWER, END_THINK, PLAN, THINK

ROLES: Final = ("messages", "prompt", "completion", "reasoning", "text")
MAX_TURNS: Final = 8  # every turn repeats its history: so many times the size of a row
REASONING: Final = ("reasoning_content", "reasoning", "thinking")
SPEAKERS: Final = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Sample:
    """One record to be: what is given (prompt), thought and answered. thought None: text without a question."""

    prompt: str
    thought: str | None
    answer: str
    strategy: str | None = None

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.prompt) + len(self.thought or "") + len(self.answer)


@dataclass(frozen=True)
class Form:
    """How rows are read. columns: role -> name of the column, where it is not the role's own."""

    columns: Mapping[str, str]
    on_tags: Literal["escape", "quarantine"] = "escape"
    history_think: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in ROLES:
                raise unknown("role in text.columns", role, ROLES)
        if len(set(self.columns.values())) < len(self.columns):
            raise ConfigError(f"text.columns names one column twice: {dict(self.columns)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that matter, in order."""
        return tuple(dict.fromkeys(name for role in ROLES for name in self._names(role)))

    def _names(self, role: str) -> tuple[str, ...]:
        if role in self.columns:
            return (self.columns[role],)
        if role == "reasoning":
            return REASONING
        return () if role in self.columns.values() else (role,)

    def _get(self, row: Mapping[str, Any], role: str) -> Any:
        found = [name for name in self._names(role) if row.get(name) is not None]
        if len(found) > 1:
            raise BadRow(f"both {found[0]!r} and {found[1]!r} hold a thought")
        return row[found[0]] if found else None

    def samples(self, row: Any) -> tuple[list[Sample], bool]:
        """(records of a row, whether a text spells a tag). Raises BadRow with the reason."""
        if not isinstance(row, Mapping):
            raise BadRow(f"a row is an object, not a {type(row).__name__}")
        messages, text = self._get(row, "messages"), self._get(row, "text")
        if messages is not None:
            found = self._conversation(messages)
        elif self._get(row, "completion") is not None or self._get(row, "prompt") is not None:
            for role in ("prompt", "completion"):
                if self._get(row, role) is None:
                    raise BadRow(f"{self._names(role)[0]!r} is missing (it has: {', '.join(map(str, list(row)[:8]))})")
            prompt = _text(self._get(row, "prompt"), "prompt")
            found = [self._turn(prompt, self._get(row, "completion"), self._get(row, "reasoning"), "completion")]
        elif text is not None:
            found = [Sample("", None, _text(text, "text"))]
        else:
            raise BadRow(self._stranger(row))
        if sum(s.size for s in found) > MAX_TURNS * MAX_ROW_BYTES:
            raise BadRow("longer than a row may be, every turn with its history")
        tags = any(spells_tag(part) for s in found for part in (s.prompt, s.thought or "", s.answer))
        if tags and self.on_tags == "quarantine":
            raise BadRow("a text spells a tag")
        return found, tags

    def _stranger(self, row: Mapping[str, Any]) -> str:
        keys = list(map(str, row))[:8]
        hints = [f"; did you mean {near!r}?" for key in keys if (near := nearest(key, self.names)) and near not in row]
        return f"no {', '.join(self.names)} (it has: {', '.join(keys) or 'nothing'}{hints[0] if hints else ''})"

    def _turn(self, prompt: str, answer: Any, reasoning: Any, name: str) -> Sample:
        strategy, thought, said = _unwrapped(_text(answer, name))
        if reasoning is not None:
            if thought:
                raise BadRow("a thought both in a column and in a think block")
            thought = _text(reasoning, "reasoning", blank=True)
        return Sample(prompt, thought or "", said, strategy)

    def _conversation(self, messages: Any) -> list[Sample]:
        """One record per assistant turn; what was said before it is its prompt."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) > MAX_MESSAGES:
            raise BadRow(f"messages is no list of at most {MAX_MESSAGES} messages")
        found: list[Sample] = []
        past: list[str] = []
        room = MAX_ROW_BYTES
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping) or message.get("role") not in SPEAKERS:
                raise BadRow(f"a message is no object with a role of {', '.join(SPEAKERS)} (message {number})")
            content = message.get("content")
            room -= sum(len(v) for v in message.values() if isinstance(v, str))
            if room < 0:
                raise BadRow(f"longer than {MAX_ROW_BYTES} characters")
            if message["role"] != "assistant":
                past.append(_text(content, "content"))
                continue
            if not past:
                raise BadRow("an assistant turn with nothing in front of it")
            thoughts = [message[n] for n in REASONING if message.get(n) is not None]
            if len(thoughts) > 1 and len(set(map(str, thoughts))) > 1:
                raise BadRow(f"two different thoughts in one message (message {number})")
            sample = self._turn("\n\n".join(past), content, thoughts[0] if thoughts else None, "content")
            found.append(sample)
            past += [sample.thought] if self.history_think == "keep" and sample.thought else []
            past.append(sample.answer)
        if not found:
            raise BadRow("no assistant turn")
        return found


def _text(value: Any, name: str, blank: bool = False) -> str:
    if value is None:
        raise BadRow(f"{name!r} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is a {type(value).__name__}, not a text")
    if not blank and not value.strip():
        raise BadRow(f"{name!r} is empty")
    return clean(value)


def _unwrapped(text: str) -> tuple[str | None, str | None, str]:
    """(strategy, thought or None, answer) of an assistant's text, in the protocol's own spelling or a bare think block.

    Only a block at the very start is one; a tag further behind is text.
    """
    body = text.lstrip()
    strategy = next((name for name, tag in PLAN.items() if body.startswith(tag)), None)
    rest = body.removeprefix(PLAN[strategy]).lstrip() if strategy else body
    if not rest.startswith(THINK):
        if END_THINK in rest:
            raise BadRow("a think block that is closed but never opened")
        return None, None, text.strip()
    thought, closed, answer = rest[len(THINK) :].partition(END_THINK)
    if not closed:
        raise BadRow("a think block that is not closed")
    answer = answer.strip()
    if answer.startswith(ANSWER) and answer.endswith(END_ANSWER):
        answer = answer[len(ANSWER) : -len(END_ANSWER)].strip()
    if not answer:
        raise BadRow("nothing behind the think block")
    return strategy, thought.strip("\n"), answer


def nodes_of(thought: str) -> tuple[Node, ...]:
    """The nodes of a thought: its own where it is written in the grammar, else one step a line."""
    graph = from_text(thought)
    if graph.nodes and not graph.warnings:
        return graph.nodes
    return tuple(Node("S", line.rstrip()) for line in thought.split("\n") if line.strip())


def encode_sample(
    tok: Tokenizer, sample: Sample, *, cut: float = 0.0, rng: random.Random | None = None, room: int | None = None
) -> tuple[Encoded, int]:
    """(record, its natural length). Loss: prompt 0, thought and answer 1; a text: everything behind <bos>.

    cut: share of the records with a thought whose block ends early, at a place drawn from `rng`; then the answer alone
    is trained. room: a record above so many ids is shortened, a thought as a budget would cut it, a text at its end;
    what does not fit even so comes back as it is.
    """
    if sample.thought is None:
        ids = [tok.bos, *tok.encode(" " + sample.answer), tok.eos]
        kept = ids if room is None else ids[:room]
        return Encoded(kept, [0] + [1] * (len(kept) - 1)), len(ids)
    nodes = nodes_of(sample.thought)
    strategy = sample.strategy or ("steps" if nodes else "direct")
    place = rng.random() if rng is not None and nodes and rng.random() < cut else None

    def record(share: float | None) -> Encoded:
        return encode_record(tok, sample.prompt, strategy, nodes, sample.answer, share)

    found = record(place)
    size = len(found.ids)
    if room is None or size <= room:
        return found, size
    start, end = found.ids.index(tok.think) + 1, found.ids.index(tok.end_think)
    whole = found if place is None else record(None)
    length = whole.ids.index(tok.end_think) - start
    keep = (end - start) - (size - room)
    return (record(keep / length) if keep >= 0 and length else found), size
