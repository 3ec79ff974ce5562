"""The training mixture: an endless weighted stream of (task, level, strategy) cells with a curriculum over levels.

Item `index` at a given progress is a pure function of (stream, index, progress): resuming needs only the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeVar

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, unknown
from gnomon.protocol.tags import STRATEGIES
from gnomon.tasks.problem import Gold, Problem
from gnomon.tasks.procedural import LEVELS, REGISTRY, draw, family

T = TypeVar("T")
ALL_LEVELS_AT: Final = 0.35  # progress from which every level has its full weight


def level_weights(progress: float, levels: Sequence[int] = LEVELS, all_at: float = ALL_LEVELS_AT) -> dict[int, float]:
    """Curriculum: the lowest level from the start, the k-th fades in over its share of [0, all_at], then uniform.

    progress is in [0, 1]; values outside are clipped.
    """
    at = min(max(progress, 0.0), 1.0)
    if all_at <= 0 or at >= all_at:
        return dict.fromkeys(levels, 1.0)
    ramp = all_at / len(levels)
    return {level: 1.0 if k == 0 else min(1.0, max(0.0, at / ramp - k)) for k, level in enumerate(sorted(levels))}


@dataclass(frozen=True)
class MixtureItem:
    """A problem, the strategy to show, and the gold trace in it."""

    problem: Problem
    strategy: str
    gold: Gold


@dataclass(frozen=True)
class Mixture:
    """Which cells a training stream draws from, and how often.

    tasks, strategies: name -> relative weight (0 = left out). Raises UnknownNameError for unknown names.
    """

    tasks: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(REGISTRY, 1.0))
    strategies: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(STRATEGIES, 1.0))
    levels: tuple[int, ...] = LEVELS
    stream: str = "pretrain"
    split: str = "train"
    all_levels_at: float = ALL_LEVELS_AT

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in REGISTRY:
                raise unknown("task", name, REGISTRY)
        for name in self.strategies:
            if name not in STRATEGIES:
                raise unknown("strategy", name, STRATEGIES)
        for what, weights in (("task", self.tasks), ("strategy", self.strategies)):
            values = list(weights.values())
            if not values or min(values) < 0 or not 0 < sum(values) < float("inf"):
                raise ConfigError(f"{what} weights must be >= 0, finite, and not all 0; given {dict(weights)}")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ConfigError(f"levels {self.levels} must be some of {LEVELS}")

    def item(self, index: int, progress: float = 1.0) -> MixtureItem:
        """Item `index` of the stream at `progress`; deterministic."""
        rng = seeds.rng("mixture", self.stream, self.split, index)
        task = _pick(rng, self.tasks)
        strategy = _pick(rng, self.strategies)
        level = _pick(rng, level_weights(progress, self.levels, self.all_levels_at))
        problem = draw(task, level, self.split, self.stream, index)
        gold = family(task).gold(problem, strategy, seeds.rng("gold", task, self.stream, index, strategy))
        return MixtureItem(problem, strategy, gold)

    def items(self, total: int, start: int = 0) -> Iterator[MixtureItem]:
        """Endless items from `start`; progress is index / total, 1 once `total` is passed."""
        index = start
        while True:
            yield self.item(index, min(1.0, index / max(1, total)))
            index += 1


def _pick(rng: Random, weights: Mapping[T, float]) -> T:
    names = list(weights)
    return rng.choices(names, weights=[weights[n] for n in names])[0]
