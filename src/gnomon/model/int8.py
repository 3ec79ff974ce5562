"""Products with int8 weights on a CPU: one scale per output, inputs rounded to int8 with one scale per row.

The sums are integers, and nothing of a row depends on its neighbours: a row's product is bit-identical in any company.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127.0


class Int8Product:
    """x float32 [N, inputs] -> float32 [N, outputs] for a weight [outputs, inputs] and an optional bias [outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        weight = weight.detach()
        scale = weight.abs().amax(1).clamp_min(1e-12) / _LARGEST
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._scale = scale
        self._zero = torch.zeros(len(scale), dtype=torch.int64)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(1e-12).div_(_LARGEST)
        rounded = (x / scale).round_().to(torch.int8)
        y = torch.ops.onednn.qlinear_pointwise.default(
            rounded, 1.0, 0, self._packed, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        ).mul_(scale)
        return y if self._bias is None else y.add_(self._bias)
