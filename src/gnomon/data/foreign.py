"""The codec of any Hugging Face tokenizer: tags as plain text of several tokens, vocabulary and folder untouched.

A prompt is one static prefix (system text and worked examples in the chat template), the user's text, and a static
suffix that ends with the generation prompt. Strategies stand behind it, so all of them share the prefix cache. What a
user types goes through a copy of the tokenizer that knows no added tokens: a tag or an end-of-turn in it stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.base.errors import ModelError, TagError
from gnomon.protocol import tags
from gnomon.protocol.graph import Graph, Node, from_text, resolve, to_text
from gnomon.protocol.layout import Layout

MAX_SPELLINGS = 64


@dataclass(frozen=True)
class Example:
    """One worked example in the prompt, written under `strategy`."""

    strategy: str
    question: str
    nodes: tuple[Node, ...]
    answer: str


@dataclass(frozen=True)
class PromptStyle:
    """system: the instruction. strategies: name -> text placed after the generation prompt, in the order of the plan
    head. empty: strategies whose block the engine closes at once. examples: shown as earlier turns."""

    system: str
    strategies: Mapping[str, str]
    empty: frozenset[str] = frozenset()
    examples: tuple[Example, ...] = ()


def _steps(*texts: str) -> tuple[Node, ...]:
    return tuple(Node("S", text) for text in texts)


# Tuned on the train split of reasoning-gym with SmolLM2-135M-Instruct: examples of one and of two steps, a short
# instruction, answers on the tag's own line. Every further example costs prefill time on a CPU and gained nothing.
DEFAULT_STYLE = PromptStyle(
    system="Solve the problem.",
    strategies={"direct": "Answer directly.\n", "steps": "Think step by step.\n"},
    empty=frozenset({"direct"}),
    examples=(
        Example("direct", 'How many times does the letter "o" appear in the text: "go to the room"?', (), "4"),
        Example(
            "steps",
            "State the final answer to the following arithmetic problem: 8 - 3 + 14 =",
            _steps("8 - 3 = 5", "5 + 14 = 19"),
            "19",
        ),
        Example("steps", "Solve the following multiplication: 4 * 6.", _steps("4 * 6 = 24"), "24"),
    ),
)


class TextCodec:
    """`gnomon.data.codec.Codec` over a transformers fast tokenizer in tag_mode text.

    notes: what was found and put right (padding side, pad id, template), one sentence each. prefix_length: ids at the
    start of every prompt that are the same whatever the user says.
    Raises ModelError for a slow tokenizer or a template that drops a message, TagError where a tag gives no ids.
    """

    def __init__(self, tokenizer: Any, style: PromptStyle = DEFAULT_STYLE, eos: Sequence[int] = ()):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer; gnomon needs a tokenizer.json beside the model"
            )
        self.tokenizer, self.style = tokenizer, style
        self.strategies: tuple[str, ...] = tuple(style.strategies)
        notes: list[str] = []
        if tokenizer.padding_side != "left":
            notes.append(f"padding_side was {tokenizer.padding_side!r}; set to 'left', decoding needs it")
            tokenizer.padding_side = "left"
        self._backend = backend
        self._plain = _without_added_tokens(backend)
        self._added = {t.content: int(i) for i, t in tokenizer.added_tokens_decoder.items()}
        flagged = {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = frozenset(flagged | {int(i) for i in tokenizer.all_special_ids})
        rendered, turn_end = self._render(notes)
        ends = [i for i in (tokenizer.eos_token_id, turn_end, *eos) if i is not None]
        self.layout = self._layout(tuple(dict.fromkeys(ends)), notes)
        before, after = rendered
        self._prefix = [i for part in before for i in self._part(part)]
        self._suffix = [i for part in after for i in self._part(part)]
        self.prefix_length = len(self._prefix)
        self.notes = tuple(notes)

    @classmethod
    def load(cls, folder: str | Path, style: PromptStyle = DEFAULT_STYLE) -> TextCodec:
        """The codec of a local model folder; nothing is downloaded. Raises ModelError naming what is missing."""
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ModelError(
                f"no model folder {str(path)!r}; gnomon never downloads one, give the path of a local folder"
            )
        if not (path / "tokenizer.json").is_file():
            raise ModelError(
                f"tokenizer.json is missing in {str(path)!r}; save the base's fast tokenizer beside its weights"
            )
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise ModelError(f"the tokenizer in {str(path)!r} cannot be read: {error}") from None
        return cls(tokenizer, style, _generation_eos(path))

    # -- the surface that every codec has -------------------------------------------------------------------------
    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the whole prompt up to and including the generation prompt; `text` is the user's."""
        return [*self._prefix, *self.encode_text(text), *self._suffix]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, stripped, special tokens left out; cut at an end tag that was spelt with other ids."""
        return self._text(ids).split(tags.END_ANSWER, 1)[0].strip()

    def think_graph(self, ids: Sequence[int], truncated: bool) -> Graph:
        """The nodes of a think block in text mode. Total: a line that is no node is read as a step, with a warning."""
        text = self._text(ids)
        graph = from_text(text, truncated)
        if not any(w.code == "syntax" for w in graph.warnings):
            return graph
        nodes = [_line(line) for line in text.split("\n") if line.strip()]
        edges, _ = resolve(nodes)
        return Graph(tuple(nodes), edges, graph.warnings)

    # -- ids ------------------------------------------------------------------------------------------------------
    def encode_text(self, text: str) -> list[int]:
        """Ids of text that somebody else wrote: never an added token, whatever the text says."""
        ids = [int(i) for i in self._plain.encode(text, add_special_tokens=False).ids]
        if len(text) < 2 or not any(i in self._added.values() for i in ids):
            return ids
        # Some vocabularies hold the special strings as ordinary pieces too: split inside each of them.
        found = "|".join(re.escape(s) for s in sorted(self._added, key=len, reverse=True) if len(s) > 1)
        match = re.search(found, text) if found else None
        if match is None:
            return ids
        middle = match.start() + 1
        return [*self.encode_text(text[:middle]), *self.encode_text(text[middle:])]

    def _own(self, text: str) -> list[int]:
        """Ids of our own text and of the template: added tokens of the base are recognised."""
        return [int(i) for i in self._backend.encode(text, add_special_tokens=False).ids]

    def _text(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens. A character that the end of `ids` cuts (a budget can) is left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")

    def _part(self, part: str | Example) -> list[int]:
        if isinstance(part, str):
            return self._own(part)
        layout, think = self.layout, to_text(part.nodes)
        return [
            *layout.plan_ids(part.strategy),
            *layout.think,
            *(self.encode_text(think + "\n") if think else ()),
            *layout.end_think,
            *layout.answer,
            *self.encode_text(part.answer),
            *layout.end_answer,
        ]

    def _layout(self, eos: tuple[int, ...], notes: list[str]) -> Layout:
        if not eos:
            raise TagError("the tokenizer names no end-of-sequence token and its template ends a turn with none")
        think, end_think = self._own(tags.THINK + "\n"), self._own(tags.END_THINK)
        answer, end_answer = self._own("\n" + tags.ANSWER), self._own(tags.END_ANSWER)
        used = {*think, *end_think, *answer, *end_answer}
        pad = self._pad(eos, notes)
        pieces = self._backend.decode_batch([[i] for i in range(len(self.tokenizer))], skip_special_tokens=False)
        return Layout(
            think=tuple(think),
            end_think=tuple(end_think),
            answer=tuple(answer),
            end_answer=tuple(end_answer),
            plans={name: tuple(self._own(text)) for name, text in self.style.strategies.items()},
            eos=eos,
            pad=pad,
            boundary=frozenset(i for i, piece in enumerate(pieces) if piece.endswith("\n")),
            end_think_also=self._spellings(tuple(end_think), pieces),
            transition=tuple(self._own("\n")),
            empty_plans=self.style.empty,
            banned=self._special - set(eos) - used,
        )

    def _pad(self, eos: tuple[int, ...], notes: list[str]) -> int:
        """An id that fills rows and ends nothing; the tokenizer's own where it can be."""
        tok = self.tokenizer
        own = tok.pad_token_id
        if own is not None and own not in eos:
            return int(own)
        candidates = [tok.unk_token_id, *sorted(self._special - {tok.bos_token_id}), tok.bos_token_id]
        pad = next((int(i) for i in candidates if i is not None and i not in eos), eos[0])
        was = "missing" if own is None else f"{tok.convert_ids_to_tokens(own)!r}, which ends a text"
        what = f"{tok.convert_ids_to_tokens(pad)!r} fills rows instead"
        notes.append(
            f"pad token was {was}; {what if pad not in eos else 'no other special token exists, rows are masked'}"
        )
        return pad

    def _spellings(self, end: tuple[int, ...], pieces: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Other ids that show the end-of-thinking tag because a neighbouring character merged into its first or last
        token (a space or punctuation before it, white space or the next tag behind it)."""
        tag = tags.END_THINK
        heads = {tag[:n] for n in range(1, len(tag))}
        tails = {tag[n:] for n in range(1, len(tag))}
        found: dict[tuple[int, ...], None] = {}
        for ident, piece in enumerate(pieces):
            for n in range(1, len(piece)):
                if piece[n:] in heads:
                    ids = self._own(piece[:n] + tag)
                    if ids[0] == ident:
                        found[tuple(ids)] = None
                if piece[:n] in tails and (piece[n:].isspace() or piece[n:] == tags.ANSWER[0]):
                    ids = self._own(tag + piece[n:])
                    if ids[-1] == ident:
                        found[tuple(ids)] = None
        found.pop(end, None)
        return tuple(sorted(found, key=len)[:MAX_SPELLINGS])

    # -- the chat template ----------------------------------------------------------------------------------------
    def _render(self, notes: list[str]) -> tuple[tuple[list[str | Example], list[str | Example]], int | None]:
        """((parts before the user's text, parts behind it), id that ends a turn or None)."""
        if not getattr(self.tokenizer, "chat_template", None):
            notes.append("no chat template; a plain 'Question / Answer' layout is used")
            return self._render_plain(), None
        for system_role in (True, False):
            slots, messages = self._messages(system_role)
            text = _apply(self.tokenizer, messages)
            pieces = _SLOT.split(text) if text is not None else []
            if [int(n) for n in pieces[1::2]] == list(range(len(slots))):
                break
        else:
            raise ModelError(
                "the chat template drops or reorders messages; gnomon needs one that keeps user turns in order"
            )
        if not system_role and self.style.system:
            notes.append("the chat template has no system role; the instruction stands in the first user turn")
        parts: list[str | Example] = [pieces[0]]
        cut = 0
        for number, (slot, following) in enumerate(zip(slots, pieces[2::2], strict=True)):
            if slot is None:
                cut = len(parts)
            else:
                parts.append(slot)
            if number == len(slots) - 1:
                following = _unopened(following, notes)
            parts.append(following)
        return (parts[:cut], parts[cut:]), self._turn_end(parts)

    def _messages(self, system_role: bool) -> tuple[list[str | Example | None], list[dict[str, str]]]:
        """Slots (what stands in each message, None = the user's text) and messages whose content is a numbered slot."""
        slots: list[str | Example | None] = []
        messages: list[dict[str, str]] = []

        def add(role: str, slot: str | Example | None, lead: str = "") -> None:
            messages.append({"role": role, "content": lead + _slot(len(slots))})
            slots.append(slot)

        lead = f"{self.style.system}\n\n" if self.style.system and not system_role else ""
        if self.style.system and system_role:
            add("system", self.style.system)
        for example in self.style.examples:
            add("user", example.question, lead)
            add("assistant", example)
            lead = ""
        add("user", None, lead)
        return slots, messages

    def _render_plain(self) -> tuple[list[str | Example], list[str | Example]]:
        tok = self.tokenizer
        parts: list[str | Example] = [tok.bos_token or ""]
        if self.style.system:
            parts.append(self.style.system + "\n\n")
        for example in self.style.examples:
            parts += [f"Question: {example.question}\nAnswer: ", example, "\n\n"]
        return [*parts, "Question: "], ["\nAnswer: "]

    def _turn_end(self, parts: Sequence[str | Example]) -> int | None:
        """The special token that the template writes behind an assistant turn."""
        for part, following in zip(parts, parts[1:], strict=False):
            if isinstance(part, Example) and isinstance(following, str):
                ids = self._own(following)
                return ids[0] if ids and ids[0] in self._special else None
        return None


_SLOT = re.compile("\ue000([0-9]+)\ue001")


def _slot(number: int) -> str:
    return f"\ue000{number}\ue001"


def _line(line: str) -> Node:
    """One line as one node behind the previous one."""
    nodes = from_text(line).nodes
    return Node(nodes[0].kind, nodes[0].text) if nodes else Node("S", line.strip())


def _apply(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """The rendered template, None where it refuses a role."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return None


def _unopened(suffix: str, notes: list[str]) -> str:
    """The generation prompt without a think block that the template opened: the engine opens it itself."""
    if not suffix.rstrip().endswith(tags.THINK):
        return suffix
    notes.append("the chat template opens the think block itself; the opening was moved behind the strategy text")
    return suffix.rstrip().removesuffix(tags.THINK)


def _without_added_tokens(backend: Any) -> Any:
    """A copy of the tokenizer that splits every added token into ordinary pieces and adds nothing."""
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec["added_tokens"], spec["post_processor"] = [], None
    spec["truncation"], spec["padding"] = None, None
    return Tokenizer.from_str(json.dumps(spec))


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """End ids that generation_config.json names."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ModelError(f"{str(path)!r} is damaged: {error}") from None
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))
