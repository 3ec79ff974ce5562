"""Keys and values of our decoder: what a pass needs of a cache, and the plain cache of `generate`.

Legend: L layers, B rows, H heads, S capacity, D head size, T new positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class KeyValues(Protocol):
    """What one forward pass appends to."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, H, T, D] -> all keys and values in view, [B, H, S', D]."""

    def advance(self, tokens: int) -> None:
        """Called once per forward pass, after every layer has appended."""


class DecoderCache:
    """Rows of one common length, padding included: one tensor [2, B, H, capacity, D] per layer.

    last int64 [B, K]: the newest real tokens of each row, newest at the right, -1 = none; who feeds the decoder keeps
    it up to date.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, capacity: int, head_size: int, like: Tensor, before: int = 1
    ):
        shape = (2, batch, heads, capacity, head_size)
        self.store = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
        self.last = torch.full((batch, before), -1, dtype=torch.int64, device=like.device)
        self.length = 0
        self.capacity = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        store = self.store[layer]
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: rows int64 [B']."""
        self.last = self.last.index_select(0, rows.to(self.last.device))
        for i, store in enumerate(self.store):
            kept = store.new_empty((2, len(rows), *store.shape[2:]))
            # Only what is filled is copied; capacity is mostly free space.
            kept[..., : self.length, :] = store[..., : self.length, :].index_select(1, rows.to(store.device))
            self.store[i] = kept


def positions_of(mask: Tensor, new: int) -> Tensor:
    """Position of each new token counted from the row's first real token: mask bool [B, S + T] -> int64 [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]


def attention_view(mask: Tensor, new: int) -> Tensor:
    """Which positions each new token may look at: mask bool [B, S + T] -> bool [B, 1, T, S + T].

    A padding position looks at itself alone, so that no row of the softmax is empty.
    """
    total = mask.shape[1]
    index = torch.arange(total, device=mask.device)
    query = index[total - new :]
    causal = index[None, :] <= query[:, None]
    itself = index[None, :] == query[:, None]
    return ((mask[:, None, :] & causal) | itself)[:, None]
