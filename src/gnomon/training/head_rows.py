"""The rows that the heads are trained on: a label set as tensors, split into training and early stopping."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnomon.base.errors import DataError
from gnomon.base.seeds import fraction
from gnomon.metacognition.policy import policy_labels
from gnomon.training.labels import HeadData, LabelSet
from gnomon.training.trials import Trials


class HeadRows:
    """The arrays of one part of a label set as tensors on one device; fields and units as in `HeadData`.

    policy [T] int64: the best entry of the sampler grid for every think row, -1 = no label. closing [R, L, C],
    closing_used [R], closing_right [R]: boundaries with trial answers (`Trials`), none without them.
    """

    def __init__(
        self,
        data: HeadData,
        policy: NDArray[np.int64],
        problems: NDArray[np.bool_],
        device: str,
        trials: Trials | None = None,
        tried: NDArray[np.bool_] | None = None,
    ) -> None:
        """problems [P], tried [R] of `trials`: the rows that are taken."""

        def take(x: NDArray[Any], rows: NDArray[np.bool_]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x[rows])).to(device)

        think, end = problems[data.think_row], problems[data.end_row]
        self.prompt, self.plan = take(data.prompt_taps, problems), take(data.plan, problems)
        self.solve, self.cost = take(data.solve, problems), take(data.cost, problems)
        self.think, self.share = take(data.think_taps, think), take(data.share, think)
        self.budget, self.censored = take(data.budget, think), take(data.censored, think)
        self.policy = take(policy, think)
        self.end, self.used, self.correct = take(data.end_taps, end), take(data.used, end), take(data.correct, end)
        at, rows = data.boundary, problems[data.boundary.row]
        self.boundary, self.spent, self.need = take(at.taps, rows), take(at.used, rows), take(at.need, rows)
        self.need_censored, self.outcome = take(at.censored, rows), take(at.correct, rows)
        if trials is None or tried is None:
            self.closing, self.closing_used, self.closing_right = self.boundary[:0], self.spent[:0], self.outcome[:0]
        else:
            self.closing = take(trials.taps, tried)
            self.closing_used = take(trials.used.astype(np.float32), tried)
            self.closing_right = take(trials.right.astype(np.float32), tried)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, C) of the states."""
        n_layers, hidden_size = self.prompt.shape[1:]
        return n_layers, hidden_size

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Rows at the prompt, the think tag, the end tag, at boundaries, and at boundaries with trial answers."""
        return len(self.plan), len(self.share), len(self.correct), len(self.outcome), len(self.closing_right)


def split(
    labels: LabelSet,
    rates: NDArray[np.floating[Any]] | None,
    share: float,
    device: str,
    trials: Trials | None = None,
) -> tuple[HeadRows, HeadRows, int]:
    """(training rows, rows for early stopping, entries of the policy head); a problem is on one side as a whole.

    rates [P, K, G]: pass rates of the sampler grid, None = no policy head; share: of problems held out, by hash of
    their id, of labels and trials alike. Raises DataError with too few problems, and with rates or trials that do not
    fit them.
    """
    data = labels.arrays()
    entries, policy = _policy(labels, rates)
    held = np.array([fraction("heads-inner-val", p.id) < share for p in labels.problems])
    if not held.any() or held.all() or not (data.plan[~held] >= 0).any():
        raise DataError(
            f"{len(labels.problems)} problems ({int((data.plan >= 0).sum())} solved by some strategy) are too few to "
            "train heads on; label more problems or easier ones"
        )
    tried = None
    if trials is not None:
        mine, theirs = list(trials.taps.shape[1:]), list(data.prompt_taps.shape[1:])
        if mine != theirs:
            raise DataError(f"the trial answers have states {mine}, the labels {theirs}; make both with one base")
        tried = np.array([fraction("heads-inner-val", p) < share for p in trials.problems])[trials.problem]
    train = HeadRows(data, policy, ~held, device, trials, None if tried is None else ~tried)
    return train, HeadRows(data, policy, held, device, trials, tried), entries


def whole(labels: LabelSet, device: str = "cpu") -> HeadRows:
    """All rows of a label set, none held out, without a decoding policy."""
    data = labels.arrays()
    every = np.ones(len(labels.problems), dtype=np.bool_)
    return HeadRows(data, np.full(len(data.think_row), -1, dtype=np.int64), every, device)


def _policy(labels: LabelSet, rates: NDArray[np.floating[Any]] | None) -> tuple[int, NDArray[np.int64]]:
    """Entries of the grid and the best of them for every think row [P · K] (-1 = no label); 0 entries without rates."""
    want = (len(labels.problems), len(labels.strategies))
    if rates is None:
        return 0, np.full(want[0] * want[1], -1, dtype=np.int64)
    if rates.ndim != 3 or rates.shape[:2] != want:
        raise DataError(
            f"policy rates must be [{want[0]}, {want[1]}, entries] for these labels, got {list(rates.shape)}"
        )
    found = policy_labels(rates.reshape(-1, rates.shape[2]))
    if not (found >= 0).any():
        raise DataError("no policy rate says what is best: none is above 0 or none was measured; leave them out")
    return rates.shape[2], found
