"""Synthetic labelled problems whose plan, budget and confidence can be read from the states, up to noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from gnomon.base.seeds import numpy_generator
from gnomon.protocol.tags import STRATEGIES
from gnomon.training.labels import LabelledProblem, LabelSet, Rollout, StrategyLabels

L, C = 4, 24
THRESHOLD = {"direct": 0.3, "steps": 0.7, "verify": 0.85, "decompose": 0.8}
RATE = {"direct": 0.0, "steps": 1.0, "verify": 1.8, "decompose": 1.4}


def chance(strategy: str, difficulty: float) -> float:
    """True probability of a right answer."""
    return float(1.0 / (1.0 + np.exp(-14.0 * (THRESHOLD[strategy] - difficulty))))


def need(strategy: str, difficulty: float) -> int:
    """True think tokens."""
    return round(RATE[strategy] * np.exp(2.0 + 2.5 * difficulty))


def make_labels(n: int, seed: int, rollouts: int = 4, noise: float = 0.05, boundaries: bool = False) -> LabelSet:
    """n problems; difficulty uniform in [0, 1]; states are a fixed random projection of the facts plus noise.

    boundaries: every rollout that thinks also has a state at a uniform place; it knows log of the whole need (so the
    remainder depends on the tokens used as well) and, up to noise, whether the answer will be right.
    """
    there = numpy_generator("boundary-mix").normal(size=(L, 3, C)) / np.sqrt(3)
    side = numpy_generator("boundaries", seed)

    def halfway(used: int, right: bool) -> tuple[int, np.ndarray] | None:
        if not boundaries or used < 2:
            return None
        facts = np.array([np.log1p(used), 1.0, (2.0 * right - 1.0) + side.normal()])
        state = np.einsum("lkc,k->lc", there, facts) + noise * side.normal(size=(L, C))
        return int(side.integers(1, used)), state.astype(np.float32)

    mix = numpy_generator("mix").normal(size=(3, L, 8, C)) / np.sqrt(8)
    rng = numpy_generator("labels", seed)

    def state(site: int, facts: list[float]) -> np.ndarray:
        v = np.zeros(8)
        v[: len(facts)] = facts
        return (np.einsum("lkc,k->lc", mix[site], v) + noise * rng.normal(size=(L, C))).astype(np.float32)

    problems = []
    for i in range(n):
        d = float(rng.random())
        strategies = {}
        for k, s in enumerate(STRATEGIES):
            one_hot = [float(k == j) for j in range(4)]
            rolls = []
            for r in range(rollouts):
                right = bool(rng.random() < chance(s, d))
                used = int(need(s, d) * rng.uniform(0.95, 1.05))
                rolls.append(
                    Rollout(
                        correct=right,
                        used=used,
                        answer_tokens=3,
                        answer_logprob=-0.1 - 0.2 * float(rng.random()),
                        closed=True,
                        taps_end=state(2, [d, 1.0, *one_hot, 2.0 * right - 1.0]),
                        greedy=r == 0,
                        boundary=halfway(used, right),
                    )
                )
            strategies[s] = StrategyLabels(state(1, [d, 1.0, *one_hot]), tuple(rolls))
        problems.append(
            LabelledProblem(f"p{seed}-{i}", f"family{i % 3}", 1 + int(d * 5), state(0, [d, 1.0]), strategies)
        )
    return LabelSet(STRATEGIES, tuple(problems), {"seed": seed})


class Synthetic(NamedTuple):
    """The generator and the truths behind it."""

    make: Callable[..., LabelSet]
    chance: Callable[[str, float], float]
    need: Callable[[str, float], int]


@pytest.fixture(scope="session")
def synthetic() -> Synthetic:
    return Synthetic(make_labels, chance, need)
