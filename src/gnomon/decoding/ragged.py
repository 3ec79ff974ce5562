"""Rows of different length as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(rows: Sequence[Sequence[int]], pad: int, width: int, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Ragged rows -> ids int64 [B, width] padded on the left, mask bool [B, width] (False at padding).

    empty: rows of nothing but padding are allowed (behind a prompt, where other positions are there to attend to).
    """
    fit = all((row or empty) and len(row) <= width for row in rows)
    assert fit, "every row must be non-empty and fit the width"
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None] >= width - lengths[:, None]


def common_prefix(prompts: Sequence[tuple[int, ...]], least: int = 64) -> int:
    """How many leading ids all prompts share, at least one id of each left over; 0 below `least` or for one prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    longest = min(map(len, prompts)) - 1
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    return shared if shared >= least else 0
