"""FeedbackGate: what was decided at the think tag, as a factor on every channel of one block inside the thought.

N rows · P proj_dim · K plans · C channels of the base
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REACH = 0.5  # a channel is scaled by 1 ± this at most


class FeedbackGate(nn.Module):
    """g [N, P], plan, confidence -> factors [N, C] in 1 ± REACH; exactly 1 at initialisation."""

    def __init__(self, proj_dim: int, n_plans: int, channels: int) -> None:
        super().__init__()
        self.n_plans = n_plans
        self.out = nn.Linear(proj_dim + n_plans + 1, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, g: Tensor, plan: Tensor, confidence: Tensor) -> Tensor:
        """g [N, P] with its gradient, plan int64 [N], confidence logit [N] (taken as a fact) -> [N, C]."""
        chosen = F.one_hot(plan, self.n_plans).to(g)
        said = torch.cat([g, chosen, torch.sigmoid(confidence.detach()).unsqueeze(-1)], -1)
        return 1.0 + REACH * torch.tanh(self.out(said))
