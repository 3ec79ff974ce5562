"""Preallocated key-value cache of our own decoder.

Legend: L layers, B rows, H heads, S capacity, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """A view of one layer: append new keys and values, get everything so far."""

    def __init__(self, owner: DecoderCache, layer: int):
        self.owner, self.layer = owner, layer

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, H, T, D] -> all keys and values so far, [B, H, length + T, D]."""
        start = self.owner.length
        end = start + k.shape[2]
        store = self.owner.store[self.layer]
        store[0, :, :, start:end] = k
        store[1, :, :, start:end] = v
        return store[0, :, :, :end], store[1, :, :, :end]


class DecoderCache:
    """Keys and values of all layers: one tensor [2, B, H, capacity, D] per layer.

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

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)

    def advance(self, tokens: int) -> None:
        """Called once per forward pass, after every layer has appended."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: rows int64 [B']."""
        self.last = self.last.index_select(0, rows.to(self.last.device))
        for i, store in enumerate(self.store):
            kept = store.new_empty((2, len(rows), *store.shape[2:]))
            # Only what is filled is copied; capacity is mostly free space.
            kept[..., : self.length, :] = store[..., : self.length, :].index_select(1, rows.to(store.device))
            self.store[i] = kept
