"""Per-layer experts: every layer says plan, budget and confidence on its own.

N rows · L layers · P proj_dim · K plans · E experts per layer
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerExperts(nn.Module):
    """z [N, L, P] -> plan_logits_pl [N, L, K], budget_raw_pl [N, L] in log1p(tokens), conf_raw_pl [N, L] logit.

    With E > 1 the experts of a layer are mixed by a softmax gate on the same state; the gate starts uniform.
    """

    def __init__(self, n_layers: int, proj_dim: int, n_plans: int, experts: int = 1) -> None:
        super().__init__()
        self.n_plans = n_plans
        self.weight = nn.Parameter(torch.randn(n_layers, experts, proj_dim, n_plans + 2) * proj_dim**-0.5 * 0.5)
        self.bias = nn.Parameter(torch.zeros(n_layers, experts, n_plans + 2))
        self.gate = nn.Parameter(torch.zeros(n_layers, proj_dim, experts))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [N, L, P] -> (plan_logits_pl [N, L, K], budget_raw_pl [N, L], conf_raw_pl [N, L])."""
        each = torch.einsum("nlp,lepo->nleo", z, self.weight) + self.bias
        mix = torch.einsum("nlp,lpe->nle", z, self.gate).softmax(-1)
        out = (each * mix.unsqueeze(-1)).sum(2)
        return out[..., : self.n_plans], out[..., self.n_plans], out[..., self.n_plans + 1]
