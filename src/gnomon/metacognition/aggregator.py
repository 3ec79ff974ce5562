"""LayerAggregator: which layers to trust for this input.

N rows · L layers · P proj_dim
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class LayerAggregator(nn.Module):
    """z [N, L, P] -> g [N, P] and weights alpha [N, L] (rows sum to 1).

    `attention` scores each layer from its own projection plus a learned prior; it starts as the plain mean.
    `mean` keeps the weights at 1/L and has no parameters.
    """

    def __init__(self, n_layers: int, proj_dim: int, kind: Literal["attention", "mean"] = "attention") -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(proj_dim))
            self.prior = nn.Parameter(torch.zeros(n_layers))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [N, L, P] -> (g [N, P], alpha [N, L])."""
        n, n_layers, proj_dim = z.shape
        if self.kind == "mean":
            alpha = z.new_full((n, n_layers), 1.0 / n_layers)
        else:
            alpha = ((z @ self.query) * proj_dim**-0.5 + self.prior).softmax(-1)
        return torch.einsum("nl,nlp->np", alpha, z), alpha
