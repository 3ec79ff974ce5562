"""Text in, ids out, for one base model: how prompts are written, where tags sit, how a think block is read.

Two codecs exist: `OwnCodec` (token mode, one token per tag) and `data.foreign.TextCodec` (text mode, tags as text).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gnomon.data.encode import decode_nodes, encode_prompt
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.graph import Graph
from gnomon.protocol.layout import Layout


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
