"""What the heads must beat: look-up tables, trace length, answer probability, fixed strategies and fixed budgets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LookUp:
    """Mean of a value per key, shrunk towards the mean of the key's first part, then the overall mean.

    Keys are tuples such as (family, level) or (family, plan); an unseen key falls back to its first part.
    """

    table: dict[tuple[Hashable, ...], float]
    coarse: dict[Hashable, float]
    overall: float

    @classmethod
    def fit(cls, keys: Sequence[tuple[Hashable, ...]], values: ArrayLike, prior: float = 2.0) -> LookUp:
        """prior: weight of the coarser mean, in rows."""
        v = np.asarray(values, dtype=np.float64)
        overall = float(v.mean()) if len(v) else 0.5
        first: dict[Hashable, list[float]] = {}
        full: dict[tuple[Hashable, ...], list[float]] = {}
        for key, value in zip(keys, v, strict=True):
            first.setdefault(key[0], []).append(float(value))
            full.setdefault(key, []).append(float(value))
        coarse = {k: (sum(x) + prior * overall) / (len(x) + prior) for k, x in first.items()}
        table = {k: (sum(x) + prior * coarse[k[0]]) / (len(x) + prior) for k, x in full.items()}
        return cls(table, coarse, overall)

    def predict(self, keys: Sequence[tuple[Hashable, ...]]) -> Floats:
        """[N] the stored means."""
        return np.array([self.table.get(k, self.coarse.get(k[0], self.overall)) for k in keys], dtype=np.float64)


@dataclass(frozen=True)
class Scaled:
    """A one-dimensional logistic fit score -> probability, so that a score can be judged by ECE and Brier."""

    slope: float
    offset: float
    centre: float
    spread: float

    @classmethod
    def fit(cls, score: ArrayLike, correct: ArrayLike, steps: int = 50) -> Scaled:
        """Newton's method with a small ridge; scores that are not finite count as the smallest finite one."""
        x = _finite(score)
        y = np.asarray(correct, dtype=np.float64)
        centre, spread = (float(x.mean()), float(x.std()) or 1.0) if len(x) else (0.0, 1.0)
        z = (x - centre) / spread
        design = np.stack([z, np.ones_like(z)], axis=1)
        w = np.zeros(2)
        ridge = np.diag([1e-3, 1e-6])
        for _ in range(steps):
            p = 0.5 * (1.0 + np.tanh(0.5 * (design @ w)))
            gradient = design.T @ (p - y) + ridge @ w
            hessian = (design * (p * (1 - p))[:, None]).T @ design + ridge + 1e-9 * np.eye(2)
            step = np.linalg.solve(hessian, gradient)
            w = w - np.clip(step, -2.0, 2.0)
            if float(np.abs(step).max()) < 1e-9:
                break
        return cls(float(w[0]), float(w[1]), centre, spread)

    def predict(self, score: ArrayLike) -> Floats:
        """[N] probabilities."""
        z = (_finite(score) - self.centre) / self.spread
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * (self.slope * z + self.offset))))


def trace_length_score(used: ArrayLike) -> Floats:
    """Shorter traces are more often right: minus log1p(think tokens)."""
    return -np.log1p(np.asarray(used, dtype=np.float64))


def answer_probability_score(mean_logprob: ArrayLike) -> Floats:
    """Length-normalised answer probability, as the mean log-prob per answer token (NaN: no answer)."""
    return np.asarray(mean_logprob, dtype=np.float64)


def _finite(score: ArrayLike) -> Floats:
    x = np.asarray(score, dtype=np.float64)
    held = np.isfinite(x)
    return np.where(held, x, x[held].min() if held.any() else 0.0)


# ---- fixed policies ----


def best_strategy(
    family: Sequence[str], correct: NDArray[np.bool_], used: Ints, plans: Sequence[str]
) -> dict[str, str]:
    """Per family the strategy with the highest accuracy (ties: fewer tokens). correct, used [N, K] on val."""
    names = np.asarray(family)
    best = {}
    for name in sorted(set(family)):
        rows = names == name
        scores = [(-float(correct[rows, k].mean()), float(used[rows, k].mean()), k) for k in range(len(plans))]
        best[name] = plans[min(scores)[2]]
    return best


@dataclass(frozen=True)
class ConstantPolicy:
    """One (strategy, budget index) per family, and what it reached on the data that it was chosen on."""

    choice: dict[str, tuple[int, int]]
    accuracy: float
    tokens: float
    price: float = field(default=0.0)

    def apply(self, family: Sequence[str], correct: NDArray[np.bool_], tokens: Ints) -> tuple[NDArray[np.bool_], Ints]:
        """correct, tokens [N, K, B] of a sweep -> (correct [N], tokens [N]) under the policy."""
        picks = np.array([self.choice.get(f, next(iter(self.choice.values()))) for f in family], dtype=np.int64)
        rows = np.arange(len(picks))
        return correct[rows, picks[:, 0], picks[:, 1]], tokens[rows, picks[:, 0], picks[:, 1]]


def constant_policies(family: Sequence[str], correct: NDArray[np.bool_], tokens: Ints) -> list[ConstantPolicy]:
    """The best per-family constants (strategy, budget) at every price of a token, from dear to free.

    correct, tokens [N, K, B] on val. For a price λ each family takes the argmax of accuracy − λ · mean tokens, which
    traces the upper hull of everything that per-family constants can reach.
    """
    names = np.asarray(family)
    keys = sorted(set(family))
    accuracy = {k: correct[names == k].mean(0) for k in keys}
    cost = {k: tokens[names == k].mean(0) for k in keys}
    share = {k: float((names == k).mean()) for k in keys}
    policies: list[ConstantPolicy] = []
    for price in (*np.geomspace(0.1, 1e-6, 60), 0.0):
        choice = {}
        for k in keys:
            value = accuracy[k] - (price + 1e-9) * cost[k]
            s, b = np.unravel_index(int(value.argmax()), value.shape)
            choice[k] = (int(s), int(b))
        if policies and policies[-1].choice == choice:
            continue
        acc = sum(share[k] * float(accuracy[k][choice[k]]) for k in keys)
        used = sum(share[k] * float(cost[k][choice[k]]) for k in keys)
        policies.append(ConstantPolicy(choice, acc, used, float(price)))
    return policies


def tokens_at(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Mean tokens that a set of (tokens, accuracy) points needs for an accuracy, linear between hull points.

    None when no point reaches it.
    """
    hull = upper_hull(points)
    for (t0, a0), (t1, a1) in zip(hull, hull[1:], strict=False):
        if a0 >= accuracy:
            return t0
        if a1 >= accuracy:
            return t0 + (t1 - t0) * (accuracy - a0) / (a1 - a0)
    if hull and hull[-1][1] >= accuracy:
        return hull[-1][0]
    return None


def upper_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(tokens, accuracy) points -> the concave, rising frontier, ascending in tokens."""
    hull: list[tuple[float, float]] = []
    for t, a in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if hull and (a <= hull[-1][1] or t == hull[-1][0]):
            continue
        while len(hull) >= 2:
            (t0, a0), (t1, a1) = hull[-2], hull[-1]
            if (a1 - a0) * (t - t0) > (a - a0) * (t1 - t0):
                break
            hull.pop()
        hull.append((t, a))
    return hull
