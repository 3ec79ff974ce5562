"""Decoding policies: a small, fixed grid of sampler settings, and which of them a prompt should be thought with.

The policy head names an entry of GRID at the think tag, when the plan is fixed (decisions.md §3).
P problems · G entries
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnomon.base.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler inside a thought: temperature (0 = greedy) and top-p mass (1 = no truncation)."""

    temperature: float
    top_p: float


# From what was asked for to what is most random: a tie goes to the earlier entry. Files hold indices into this tuple,
# so entries may be appended and never changed.
GRID: Final[tuple[Sampling | None, ...]] = (
    None,  # identity: the sampler's own settings
    Sampling(0.3, 1.0),
    Sampling(0.6, 0.95),
    Sampling(0.8, 0.95),
    Sampling(1.0, 0.9),
)
IDENTITY: Final = 0


def settings(policy: Sampling | None, temperature: float, top_p: float, *, thinking: bool) -> tuple[float, float]:
    """(temperature, top-p) of a row's next token: the policy's inside the thought, the request's own anywhere else.

    An answer keeps the settings that were asked for, because pass rates of the grid are measured that way.
    """
    if policy is None or not thinking:
        return temperature, top_p
    return policy.temperature, policy.top_p


def policy_labels(pass_rates: ArrayLike) -> NDArray[np.int64]:
    """pass_rates [P, G], share right with each of GRID[:G] at one plan -> the best entry [P]; ties to the earliest.

    -1 = no label: nothing was ever right, or an entry was not measured (NaN). Raises DataError on other shapes and on
    numbers that are no shares.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    if rates.ndim != 2 or not 2 <= rates.shape[1] <= len(GRID):
        raise DataError(
            f"pass rates must be [problems, entries] with 2 to {len(GRID)} entries of the grid, got {list(rates.shape)}"
        )
    bad = np.flatnonzero(((rates < 0.0) | (rates > 1.0)).any(1))
    if len(bad):
        raise DataError(f"pass rates are shares from 0 to 1; row {bad[0]} holds {rates[bad[0]].tolist()}")
    known = np.asarray(~np.isnan(rates).any(1))
    filled = np.where(known[:, None], rates, 0.0)
    return np.where(filled.max(1) > 0.0, filled.argmax(1), -1).astype(np.int64)
