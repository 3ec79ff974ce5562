"""Where sequences live while they are decoded: slots of a preallocated cache, each with its own length.

Legend: L layers · N slots · H heads · S capacity · D head size · R rows of a pass · T new tokens (the longest row's).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
VIEW_STEP = 64  # passes look at a multiple of so many positions, so that neighbours seldom change a shape


class SlotCache(Protocol):
    """What the engine knows of a cache. capacity: positions that a slot can hold."""

    capacity: int

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[N] positions held by every slot."""

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Make `target` hold the first `length` positions of `source` (default all): a shared prompt, a branch."""

    def move(self, source: int, target: int) -> None:
        """Give `target` what `source` holds; `source` is empty afterwards."""

    def cut(self, slot: int, length: int = 0) -> None:
        """Forget the positions of a slot from `length` on; 0 empties it."""

    def resized(self, slots: int, capacity: int) -> SlotCache:
        """The same contents in a larger cache; this one may not be used any more."""


def row_bucket(rows: int) -> int:
    """How many rows a torch pass is computed with: a matrix product rounds differently for other shapes."""
    at = bisect.bisect_left(_ROWS, rows)
    return _ROWS[at] if at < len(_ROWS) else rows


def rounded(n: int, step: int) -> int:
    """The smallest multiple of `step` that is at least n."""
    return -(-n // step) * step


class TensorSlots:
    """Slots as torch tensors [2, N, H, S + 1, D] per layer; the last position takes what padding writes.

    ids int64 [N, S]: the tokens held, for models that look at the tokens before a position.
    """

    def __init__(self, layers: int, slots: int, heads: int, capacity: int, head_size: int, like: Tensor) -> None:
        shape = (2, slots, heads, rounded(capacity, VIEW_STEP) + 1, head_size)
        # Zeros, not garbage: a masked position has weight 0, and 0 · NaN is NaN.
        self.store = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
        self.capacity = shape[3] - 1
        self.ids = torch.zeros((slots, self.capacity + 1), dtype=torch.int64, device=like.device)
        self.lengths = np.zeros(slots, dtype=np.int32)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        n = int(self.lengths[source]) if length is None else length
        for store in self.store:
            store[:, target, :, :n] = store[:, source, :, :n]
        self.ids[target, :n] = self.ids[source, :n]
        self.lengths[target] = n

    def move(self, source: int, target: int) -> None:
        self.copy(source, target)
        self.lengths[source] = 0

    def resized(self, slots: int, capacity: int) -> TensorSlots:
        _, held, heads, _, size = self.store[0].shape
        slots = row_bucket(max(slots, held))
        new = TensorSlots(len(self.store), slots, heads, max(capacity, self.capacity), size, self.store[0])
        n = int(self.lengths.max())
        for old, store in zip(self.store, new.store, strict=True):
            store[:, :held, :, :n] = old[:, :, :, :n]
        new.ids[:held, :n] = self.ids[:, :n]
        new.lengths[:held] = self.lengths
        return new

    def cut(self, slot: int, length: int = 0) -> None:
        assert 0 <= length <= self.lengths[slot]
        self.lengths[slot] = length


@dataclass(frozen=True)
class Pass:
    """One pass over rows that stand in the slots first, first + 1, … (padding rows behind them included).

    ids int64 [R, T], right-padded; positions int64 [R, T] (padding: S, the spare one); places: the same, clipped into
    the context for position tables; mask bool [R, 1, T, view]; counts [R]: real new tokens; last int64 [R]: column of
    each row's last new token.
    """

    cache: TensorSlots
    first: int
    ids: Tensor
    positions: Tensor
    places: Tensor
    mask: Tensor
    counts: NDArray[np.int32]
    last: Tensor
    view: int
    start: int | None  # all rows begin here and none is padded: a slice will do

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [R, H, T, D] of the new tokens -> keys and values in view, [R, H, view, D]."""
        rows = slice(self.first, self.first + k.shape[0])
        store = self.cache.store[layer][:, rows]
        if self.start is not None:
            end = self.start + k.shape[2]
            store[0, :, :, self.start : end] = k
            store[1, :, :, self.start : end] = v
        else:
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            store[0].transpose(1, 2).index_put_((row, self.positions), k.transpose(1, 2))
            store[1].transpose(1, 2).index_put_((row, self.positions), v.transpose(1, 2))
        return store[0, :, :, : self.view], store[1, :, :, : self.view]

    def previous(self, depth: int) -> Tensor:
        """The tokens before each new one, nearest first, -1 = none: int64 [R, T, depth]."""
        rows = self.cache.ids[self.first : self.first + self.ids.shape[0]]
        back = self.positions[..., None] - torch.arange(1, depth + 1, device=self.ids.device)
        found = rows.gather(1, back.clamp_min(0).flatten(1)).view_as(back)
        return torch.where(back >= 0, found, -1)

    def advance(self, tokens: int) -> None:
        """Count the real ones of the new tokens."""
        self.cache.lengths[self.first : self.first + len(self.counts)] += self.counts


def start_pass(
    cache: TensorSlots, tokens: Sequence[Sequence[int]], first: int, context: int, rows: int | None = None
) -> Pass:
    """Lay out a pass: tokens of the slots from `first` on, filled up with padding to `rows` rows.

    rows: by default the bucket of what is there, as far as there are slots behind `first`.
    """
    if rows is None:
        rows = max(len(tokens), min(row_bucket(len(tokens)), len(cache.lengths) - first))
    device = cache.ids.device
    counts = np.array([len(t) for t in tokens] + [0] * (rows - len(tokens)), dtype=np.int32)
    width = int(counts.max())
    begin = cache.lengths[first : first + rows].astype(np.int64)
    end = begin + counts
    assert int(end.max()) <= cache.capacity, "the cache has no room for these tokens"
    ids = np.zeros((rows, width), dtype=np.int64)
    for r, row in enumerate(tokens):
        ids[r, : len(row)] = row
    column = np.arange(width)
    where = np.where(column < counts[:, None], begin[:, None] + column, cache.capacity)
    view = min(cache.capacity, rounded(int(end.max()), VIEW_STEP))
    even = len(tokens) == rows and bool((begin == begin[0]).all()) and bool((counts == width).all())
    positions = torch.from_numpy(where).to(device)
    row = torch.arange(rows, device=device)[:, None]
    new = torch.from_numpy(ids).to(device)
    cache.ids[first : first + rows].index_put_((row, positions), new)
    # A padding position sees position 0 only: no row of a softmax may be empty.
    seen = torch.where(positions < cache.capacity, positions, 0)
    mask = (torch.arange(view, device=device) <= seen[..., None])[:, None]
    return Pass(
        cache=cache,
        first=first,
        ids=new,
        positions=positions,
        places=positions.clamp_max(context - 1),
        mask=mask,
        counts=counts,
        last=torch.from_numpy(np.maximum(counts.astype(np.int64) - 1, 0)).to(device),
        view=view,
        start=int(begin[0]) if even else None,
    )
