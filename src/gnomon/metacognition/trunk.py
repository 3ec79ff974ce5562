"""PerLayerTrunk: one two-layer MLP, shared by all layers, from hidden states to `proj_dim`.

N rows · L tapped layers · C hidden size · W width · P proj_dim · S sites
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.base.errors import DataError
from gnomon.metacognition.config import SITES


class PerLayerTrunk(nn.Module):
    """taps [N, L, C] -> [N, L, P]. Standardises with fixed statistics per (site, layer), kept as buffers.

    The site and the layer enter as learned offsets, the tokens used so far as log1p(used); a site may also rescale
    the hidden units, because "at the prompt" and "after thinking" ask different questions of the same state.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_layers: int, hidden_size: int, proj_dim: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        n_sites = len(SITES)
        self.register_buffer("mean", torch.zeros(n_sites, n_layers, hidden_size))
        self.register_buffer("scale", torch.ones(n_sites, n_layers, hidden_size))
        self.inp = nn.Linear(hidden_size, width)
        self.layer_offset = nn.Parameter(torch.zeros(n_layers, width))
        self.site_offset = nn.Parameter(torch.zeros(n_sites, width))
        self.site_gain = nn.Parameter(torch.zeros(n_sites, width))
        self.used_offset = nn.Parameter(torch.zeros(width))
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, proj_dim)
        self.norm = nn.LayerNorm(proj_dim)

    @torch.no_grad()
    def set_statistics(self, taps: Tensor, site: Tensor) -> None:
        """Store mean and spread of the training states, site by site; sites without rows borrow from all rows.

        taps [N, L, C] float, site [N] int64. Raises DataError on non-finite states.
        """
        if not torch.isfinite(taps).all():
            raise DataError("the training states hold NaN or infinity; the backbone or its taps are broken")
        for s in range(len(SITES)):
            rows = taps[site == s] if bool((site == s).any()) else taps
            self.mean[s] = rows.mean(0)
            spread = rows.std(0, unbiased=False)
            # A unit that hardly moves must not be blown up: floor at 5 % of the layer's typical spread.
            floor = spread.mean(-1, keepdim=True) * 0.05 + 1e-6
            self.scale[s] = torch.maximum(spread, floor)

    def forward(self, taps: Tensor, site: Tensor, used: Tensor) -> Tensor:
        """taps [N, L, C], site [N] int64, used [N] tokens -> [N, L, P]."""
        x = (taps.float() - self.mean[site]) / self.scale[site]
        x = x.clamp(-8.0, 8.0)
        h = self.inp(self.drop(x)) * (1.0 + self.site_gain[site]).unsqueeze(1)
        h = h + self.layer_offset + self.site_offset[site].unsqueeze(1)
        h = h + torch.log1p(used.float().clamp_min(0.0))[:, None, None] * self.used_offset
        return self.norm(self.out(self.drop(nn.functional.gelu(h))))
