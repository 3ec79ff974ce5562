"""Rows of tensors, on a CPU through numpy.

A torch operation as small as picking six rows may wake torch's own threads; they spin for milliseconds on the cores
that the compiled kernels need, and a step took twice as long (docs/log.md, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnomon.base.errors import ModelError
from gnomon.decoding.row import Row
from gnomon.model.steering import Steering


def picked(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x [R, ...] -> the rows asked for: x itself where that is all of them, in order, else a copy."""
    if len(rows) == x.shape[0]:
        return x  # ascending and distinct, as callers ask
    at = list(rows)
    return torch.from_numpy(x.numpy()[at]) if x.device.type == "cpu" else x[at]


def joined(above: Tensor, below: Tensor) -> Tensor:
    """[A, ...] and [B, ...] -> [A + B, ...]."""
    if above.device.type != "cpu":
        return torch.cat([above, below])
    return torch.from_numpy(np.concatenate([above.numpy(), below.numpy()]))


def arrays(taps: Tensor | None) -> list[Any]:
    """[R, L, C] on any device -> float32 arrays [L, C] that own their memory."""
    assert taps is not None, "the backbone was asked for taps and gave none"
    return [row.copy() for row in taps.detach().float().cpu().numpy()]


def gates(rows: Sequence[Row], steering: Steering) -> Tensor:
    """The rows' gate vectors as float32 [R, C]; [1, 0] where the layer has no gate and nobody reads them.

    Raises ModelError where a layer steers with a gate and has not said by how much: a compiled base would read on.
    """
    if steering.gate_layer is None:
        return torch.empty(1, 0)
    found = [row.before.gate for row in rows if row.before is not None and row.before.gate is not None]
    if len(found) < len(rows):
        raise ModelError(
            f"the layer multiplies block {steering.gate_layer} but `budget` gave no gate vector for "
            f"{len(rows) - len(found)} of {len(rows)} rows; give one [C] for each, or a Steering without gate_layer"
        )
    return torch.from_numpy(np.stack([gate.cpu().numpy() for gate in found]))
