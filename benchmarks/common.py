"""What the benchmarks share: the workload and the interval of a median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gnomon.base import seeds
from gnomon.tasks.procedural import problems

MIXED = (0, 4, 8, 16, 32, 64, 128)
UNIFORM = 64


@dataclass(frozen=True)
class Work:
    """Prompts as ids, and a budget for each."""

    prompts: tuple[tuple[int, ...], ...]
    budgets: tuple[int, ...]

    @property
    def useful(self) -> int:
        return sum(self.budgets)


def workload(encode: Callable[[str], Sequence[int]], n: int, kind: str) -> Work:
    """`n` fixed problems of all families; budgets by a hashed name."""
    items = problems("all", "val", "bench", n, (1, 2, 3, 4, 5))
    draw = seeds.rng("bench-budgets", kind)
    budgets = [UNIFORM if kind == "uniform" else draw.choice(MIXED) for _ in items]
    return Work(tuple(tuple(encode(p.prompt)) for p in items), tuple(budgets))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics (binomial)."""
    ranked, n = sorted(values), len(values)
    k = max(0, round(n / 2 - 0.98 * n**0.5) - 1)
    return ranked[k], ranked[n - 1 - k]
