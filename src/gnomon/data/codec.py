"""Text in, ids out, for one base model: how prompts are written, where tags sit, how a think block is read.

Two codecs exist: `OwnCodec` (token mode, one token per tag) and `data.foreign.TextCodec` (text mode, tags as text).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

from gnomon.data.encode import decode_nodes, encode_prompt
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.graph import Graph
from gnomon.protocol.layout import Layout
from gnomon.protocol.tags import TAGS


class Codec(Protocol):
    """What evaluation, rollouts and chat need of a tokenizer."""

    layout: Layout
    strategies: tuple[str, ...]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids up to the last prompt token; tag strings in `text` stay text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids (an answer, say)."""

    def think_graph(self, ids: Sequence[int], truncated: bool) -> Graph:
        """The nodes of a think block; total on anything a model writes."""


_PROBES: Final = ("Compute 34 + 27 - 15.", "naïve Ωmega 東京 🙂", "a\n\n  b\tc " + " ".join(TAGS), "0123456789")


def fingerprint(codec: Codec) -> str:
    """Hash of how questions and tags become ids: vocabulary, template and wording, as far as a few probes show them."""
    layout = codec.layout
    tags = (layout.think, layout.end_think, layout.answer, layout.end_answer, sorted(layout.plans.items()), layout.eos)
    return hashlib.sha256(repr((tags, [codec.encode_prompt(text) for text in _PROBES])).encode()).hexdigest()


class OwnCodec:
    """Our own tokenizer in token mode."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.layout = Layout.atomic(tokenizer)
        self.strategies = tuple(tokenizer.plan)

    def encode_prompt(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).strip()

    def think_graph(self, ids: Sequence[int], truncated: bool) -> Graph:
        return decode_nodes(self.tokenizer, ids, truncated)
