"""SideAdapters: low-rank residuals beside the blocks of the base, a hard-concrete gate per token.

C channels of the base · r rank
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gnomon.model.steering import Adapter

OPEN = 2.0  # log α at the start: gates begin at .96 of their range, and the expected L0 at .98


class SideAdapters(nn.Module):
    """One adapter for each of the named blocks; they add exactly nothing at initialisation."""

    def __init__(self, blocks: Sequence[int], channels: int, rank: int) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        n = len(self.blocks)
        self.down = nn.Parameter(torch.randn(n, rank, channels) * channels**-0.5)
        self.up = nn.Parameter(torch.zeros(n, channels, rank))
        self.weight = nn.Parameter(torch.zeros(n, channels))
        self.bias = nn.Parameter(torch.full((n,), OPEN))

    def by_block(self) -> dict[int, Adapter]:
        """Block -> its weights, as views that carry gradients."""
        return {
            block: Adapter(self.down[i], self.up[i], self.weight[i], self.bias[i])
            for i, block in enumerate(self.blocks)
        }
