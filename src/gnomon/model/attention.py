"""Causal self-attention with RoPE and QK-norm.

Legend: B rows, T new positions, S positions in view, H heads, D head size, C = H * D channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnomon.model import fused
from gnomon.model.fused import Linear, Segments

Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new keys and values -> all in view (KeyValues.append)


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm without weights over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rope_table(context: int, head_size: int, base: float) -> Tensor:
    """Cosine and sine of every position: [context, 2, D/2] float32."""
    inverse = base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.arange(context, dtype=torch.float32)[:, None] * inverse
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def record_mask(positions: Tensor) -> Tensor:
    """Who may look where in packed rows: positions int64 [B, T], 0 where a record begins -> bool [B, 1, T, T]."""
    record = (positions == 0).cumsum(-1)
    same = record[:, :, None] == record[:, None, :]
    return (same & torch.ones_like(same[0]).tril()).unsqueeze(1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply RoPE: x [B, H, T, D], table [B or 1, T, 2, D/2] of the rows' positions -> [B, H, T, D]."""
    cos, sin = table[:, None, :, 0].to(x.dtype), table[:, None, :, 1].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention. The output projection starts at zero, so a fresh block adds nothing.

    QK-norm bounds the scores by sqrt(D); `gain`, one per head, lets a head look at a single position when D is small.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads or (channels // heads) % 2:
            raise ValueError(f"channels {channels} must split into {heads} heads of even size.")
        self.heads, self.head_size = heads, channels // heads
        self.qkv = Linear(channels, 3 * channels)
        self.out = Linear(channels, channels)
        self.gain = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | Segments | None, append: Append | None) -> Tensor:
        """x [B, T, C]; mask bool [B, 1, T, S] (True = may look) or None for plain causal -> [B, T, C].

        Segments: causal inside records, by the compiled kernel.
        """
        batch, length, channels = x.shape
        if isinstance(mask, Segments):
            qkv = self.qkv(x).view(batch * length, 3, self.heads, self.head_size)
            return self.out(fused.attend(qkv, self.gain, table.flatten(0, 1), *mask).view(batch, length, channels))
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k = rotate(rms_norm(q), table), rotate(rms_norm(k), table)
        q = q * self.gain[:, None, None].to(q.dtype)
        if append is not None:
            k, v = append(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, channels))
