"""Problems as frozen data, and what a family must offer. No torch, no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol

from gnomon.protocol.graph import Node

Split = Literal["train", "val", "calibration", "test"]
SPLITS: tuple[str, ...] = ("train", "val", "calibration", "test")


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer and everything that a verifier needs.

    verifier: a name in `tasks/verifiers.py`.
    data: family-private facts (JSON-able) from which golds and the verifier work.
    """

    task: str
    level: int
    prompt: str
    answer: str
    verifier: str = "exact"
    data: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"
    stream: str = "default"
    index: int = 0


@dataclass(frozen=True)
class Gold:
    """A gold trace in one strategy: think nodes (empty for `direct`) and the answer text."""

    strategy: str
    nodes: tuple[Node, ...]
    answer: str


class Family(Protocol):
    """A procedural family: one short file. Levels 1–5 are frozen in it (decisions.md §7)."""

    name: str

    def generate(self, rng: Random, level: int) -> Problem:
        """A problem of `level` (1–5), drawn from `rng` alone; split, stream and index are set by the caller."""

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """The gold trace of `problem` in `strategy`; `rng` only decides planted slips in `verify`."""

    def space(self, level: int) -> int:
        """How many distinct problem texts the level has (an honest lower bound is enough)."""
