"""The small fits that a calibration card is made of: Platt scaling, split-conformal offsets, and what they reached."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gnomon.base.errors import DataError
from gnomon.evaluation import metrics
from gnomon.evaluation.baselines import Scaled
from gnomon.metacognition.calibration import Quality

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def fit_scale(logits: Floats, correct: Bools | Floats) -> tuple[float, float]:
    """(temperature, shift) that minimise the log loss of sigmoid(logit / temperature + shift), Platt (1999).

    The temperature is kept in [1/20, 20]; at a bound the shift matches the mean. One pseudo-row of either outcome keeps
    the shift finite. Raises DataError on no rows.
    """
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(x):
        raise DataError("a temperature needs at least one row")
    x, y = np.append(x, [x.mean(), x.mean()]), np.append(y, [0.0, 1.0])
    found = Scaled.fit(x, y)
    slope = found.slope / found.spread
    if 1 / 20 <= slope <= 20:
        return 1.0 / slope, found.offset - slope * found.centre
    temperature = 20.0 if slope < 1 / 20 else 1 / 20
    mean = float(y.mean())
    return temperature, math.log(mean / (1.0 - mean)) - found.centre / temperature


def conformal_offset(raw: Floats, used: Ints, level: float) -> float:
    """The offset in log1p(tokens) under which `level` of exchangeable needs fall (split-conformal quantile).

    Caps are rounded up to whole tokens, so a need of u fits as soon as the unrounded cap passes u − 1; the score says
    so, otherwise short needs would be covered too often.
    """
    need = np.maximum(np.asarray(used, dtype=np.float64) - 1.0, -1.0) + 1e-6
    gap = np.sort(np.log1p(need) - raw)
    if not len(gap):
        raise DataError("no correct solution in the calibration split: the budget clip cannot be fitted")
    rank = min(len(gap), math.ceil((len(gap) + 1) * level))
    return float(gap[rank - 1])


def quality(prob: Floats, correct: Bools) -> Quality:
    """ECE, Brier and AUROC (None when one class is missing) of probabilities [N]."""
    area = metrics.auroc(prob, correct)
    return Quality(
        n=len(prob),
        ece=metrics.ece(prob, correct),
        brier=metrics.brier(prob, correct),
        auroc=None if math.isnan(area) else area,
    )
