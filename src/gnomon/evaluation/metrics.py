"""Metrics in plain numpy, tested against scikit-learn. Every function says what it does with empty input."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnomon.base.seeds import numpy_generator

Floats = NDArray[np.float64]
Interval = tuple[float, float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")


# ---- text ----


def normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces (the SQuAD convention)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, gold: str) -> bool:
    """Equality after `normalise`."""
    return normalise(answer) == normalise(gold)


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of word precision and recall; 1.0 when both are empty."""
    a, g = normalise(answer).split(), normalise(gold).split()
    if not a or not g:
        return float(a == g)
    shared = sum((Counter(a) & Counter(g)).values())
    return 2.0 * shared / (len(a) + len(g))


# ---- calibration and ranking ----


def ece(prob: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error over bins of equal mass (fewer when rows are few); NaN when empty."""
    table = reliability(prob, correct, bins)
    total = sum(n for _, _, n in table)
    return sum(n * abs(p - c) for p, c, n in table) / total if total else math.nan


def reliability(prob: ArrayLike, correct: ArrayLike, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean probability, share correct, n) per equal-mass bin, ascending. Ties of one value may span bins."""
    p, c = _pair(prob, correct)
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(1, len(p)))) if len(part)]
    return [(float(p[part].mean()), float(c[part].mean()), len(part)) for part in parts]


def brier(prob: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared error of the probability; NaN when empty."""
    p, c = _pair(prob, correct)
    return float(np.mean((p - c) ** 2)) if len(p) else math.nan


def log_loss(prob: ArrayLike, correct: ArrayLike) -> float:
    """Mean negative log-likelihood with probabilities held inside [1e-7, 1 - 1e-7]; NaN when empty."""
    p, c = _pair(prob, correct)
    p = np.clip(p, 1e-7, 1.0 - 1e-7)
    return float(-np.mean(c * np.log(p) + (1.0 - c) * np.log(1.0 - p))) if len(p) else math.nan


def auroc(score: ArrayLike, correct: ArrayLike) -> float:
    """Probability that a right row outranks a wrong one, ties at half; NaN when one class is missing."""
    s, c = _pair(score, correct)
    positive = int((c > 0.5).sum())
    negative = len(c) - positive
    if not positive or not negative:
        return math.nan
    ranks = _ranks(s)
    return float((ranks[c > 0.5].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _ranks(x: Floats) -> Floats:
    """1-based ranks, ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(((last - counts + 1 + last) / 2.0)[inverse], dtype=np.float64)


# ---- budgets ----


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation; NaN with fewer than three rows or a constant side."""
    a, b = _pair(x, y)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def budget_corr(predicted: ArrayLike, needed: ArrayLike) -> float:
    """Pearson of log1p(tokens), pooled."""
    p, n = _pair(predicted, needed)
    return pearson(np.log1p(p), np.log1p(n))


def budget_corr_within(predicted: ArrayLike, needed: ArrayLike, group: ArrayLike) -> float:
    """Pearson of log1p(tokens) after subtracting each group's mean on both sides (pooled within-group)."""
    p, n = (np.log1p(v) for v in _pair(predicted, needed))
    g = np.asarray(group)
    a, b = p.copy(), n.copy()
    for key in np.unique(g):
        rows = g == key
        a[rows] -= p[rows].mean()
        b[rows] -= n[rows].mean()
    return pearson(a, b)


def coverage(cap: ArrayLike, needed: ArrayLike) -> float:
    """Share of rows whose need fits inside the cap; NaN when empty."""
    c, n = _pair(cap, needed)
    return float(np.mean(n <= c)) if len(c) else math.nan


def budget_errors(predicted: ArrayLike, needed: ArrayLike) -> dict[str, float]:
    """Median and 95th percentile of |predicted - needed| in tokens; NaN when empty."""
    p, n = _pair(predicted, needed)
    gap = np.abs(p - n)
    if not len(gap):
        return {"median_abs_error": math.nan, "p95_abs_error": math.nan}
    return {"median_abs_error": float(np.median(gap)), "p95_abs_error": float(np.quantile(gap, 0.95))}


def violation_rate(used: ArrayLike, effective: ArrayLike) -> float:
    """Share of rows with more think tokens than the effective budget; NaN when empty."""
    u, e = _pair(used, effective)
    return float(np.mean(u > e)) if len(u) else math.nan


# ---- modes, blocks, collapse (budget-rules.md, failures 23-25) ----


def mode_rates(thinks: ArrayLike, level: ArrayLike) -> dict[str, float]:
    """Share of rows that think, per level, and `spread`: the largest share minus the smallest.

    A policy that always or never thinks has spread 0 and one share everywhere: its mode has collapsed.
    """
    t, levels = np.asarray(thinks, dtype=np.float64), np.asarray(level)
    assert len(t) == len(levels), f"columns of different length: {len(t)} and {len(levels)}"
    rates = {str(key): float(t[levels == key].mean()) for key in np.unique(levels)}
    return rates | {"spread": max(rates.values()) - min(rates.values()) if rates else math.nan}


def block_states(used: ArrayLike, cut: ArrayLike, opened: ArrayLike | None = None) -> dict[str, int]:
    """Counts of think blocks that are valid, empty, missing or truncated; every row is in exactly one.

    used: think tokens (or characters). cut: the block was not closed by the model itself. opened: whether there is a
    block at all (None: always, as where the engine opens it). Accuracy can hold while `valid` goes to zero.
    """
    u, c = _pair(used, cut)
    there = np.ones(len(u), dtype=bool) if opened is None else np.asarray(opened, dtype=bool)
    truncated = there & (c > 0)
    empty = there & ~truncated & (u == 0)
    return {
        "valid": int((there & ~truncated & ~empty).sum()),
        "empty": int(empty.sum()),
        "missing": int((~there).sum()),
        "truncated": int(truncated.sum()),
    }


def sharpness(prob: ArrayLike) -> dict[str, float]:
    """Mean and spread of stated probabilities and the share within .01 of 0 or 1; NaN when empty.

    Confidence that collapses to 1.0 has `sd` near 0 and `saturated` near 1, whatever the calibration error says.
    """
    p = np.asarray(prob, dtype=np.float64).ravel()
    if not len(p):
        return {"mean": math.nan, "sd": math.nan, "saturated": math.nan}
    return {"mean": float(p.mean()), "sd": float(p.std()), "saturated": float(np.mean((p <= 0.01) | (p >= 0.99)))}


# ---- intervals ----


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> Interval:
    """Wilson score interval of a proportion; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))  # rounding may not shut p out


def bootstrap(
    statistic: Callable[..., float], *columns: ArrayLike, draws: int = 500, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of a statistic of paired columns, rows resampled; (NaN, NaN) when empty.

    Draws on which the statistic is NaN are left out.
    """
    data = [np.asarray(c) for c in columns]
    n = len(data[0])
    if n == 0:
        return math.nan, math.nan
    generator = numpy_generator("bootstrap", seed)
    values = []
    for _ in range(draws):
        rows = generator.integers(0, n, n)
        values.append(statistic(*(d[rows] for d in data)))
    held = np.asarray(values, dtype=np.float64)
    held = held[np.isfinite(held)]
    if not len(held):
        return math.nan, math.nan
    return float(np.quantile(held, (1 - level) / 2)), float(np.quantile(held, (1 + level) / 2))


def paired_difference(a: ArrayLike, b: ArrayLike, draws: int = 2000, seed: int = 0) -> tuple[float, Interval]:
    """Mean of a - b over the same problems, and its bootstrap interval (95 %)."""
    gap = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not len(gap):
        return math.nan, (math.nan, math.nan)
    generator = numpy_generator("paired", seed)
    means = np.array([gap[generator.integers(0, len(gap), len(gap))].mean() for _ in range(draws)])
    return float(gap.mean()), (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    assert len(a) == len(b), f"columns of different length: {len(a)} and {len(b)}"
    return a, b
