"""What the engine hears from a metacognitive layer (gnomon.metacognition.decide), row by row."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AfterChoice(Protocol):
    """What the metacognitive layer says at the end tag."""

    @property
    def confidence(self) -> float | None: ...
    @property
    def calibrated(self) -> bool: ...
    @property
    def raw(self) -> float: ...


class BudgetChoice(AfterChoice, Protocol):
    """What it says at the think tag: the same, and a budget."""

    @property
    def predicted(self) -> float: ...
    @property
    def clipped(self) -> int: ...
    @property
    def gate(self) -> Tensor | None: ...
    @property
    def at_boundaries(self) -> bool: ...
    @property
    def promised(self) -> float | None: ...


class RunningChoice(Protocol):
    """What it says at a boundary: the tokens still needed, an upper bound of them, and confidence."""

    @property
    def remaining(self) -> float: ...
    @property
    def upper(self) -> int: ...
    @property
    def confidence(self) -> float | None: ...
