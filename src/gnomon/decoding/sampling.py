"""Greedy, temperature, top-k and top-p sampling of a batch, every row with its own parameters and random stream.

Legend: B rows · V vocabulary. A row's result depends on that row alone: one uniform number per (request, step) from a
counter-based hash picks a token by the inverse of the row's cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from gnomon.base import native, seeds
from gnomon.base.native import Pointer, pointer

SOURCE: Final = Path(__file__).with_name("sample.c")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, request_id: str, sample: int) -> int:
    """The 63-bit key of one sample's random stream."""
    return seeds.derive("sampling", seed, request_id, sample)


def uniforms(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row from keys and steps (uint64 [B]): splitmix64 of a counter, 52 bits."""
    with np.errstate(over="ignore"):
        x = keys + (steps + np.uint64(1)) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(12)).astype(np.float64) * 2.0**-52


@dataclass(frozen=True)
class Params:
    """Per-row settings as tensors on the logits' device. Build with `params`, narrow with `take`."""

    temperature: Tensor  # [B] float32, 1 for greedy rows
    top_k: Tensor  # [B] int64, V when off
    top_p: Tensor  # [B] float32
    greedy: Tensor  # [B] bool
    keys: np.ndarray  # [B] uint64
    heat: np.ndarray  # [B] float32 temperature, 0 for greedy rows
    cut: np.ndarray  # rows that truncate
    all_greedy: bool
    truncates: bool

    def take(self, rows: Sequence[int]) -> Params:
        """The settings of these rows."""
        at = torch.tensor(list(rows), dtype=torch.int64, device=self.greedy.device)
        return _params(
            self.temperature[at], self.top_k[at], self.top_p[at], self.greedy[at], self.keys[np.asarray(rows, np.int64)]
        )


def params(
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    keys: Sequence[int],
    device: torch.device | str = "cpu",
) -> Params:
    """Settings of B rows: temperature 0 = greedy, top_k 0 = off, top_p 1 = off; keys from `stream_key`."""
    t = torch.tensor(temperature, dtype=torch.float32, device=device)
    k = torch.tensor([k if k > 0 else 2**62 for k in top_k], dtype=torch.int64, device=device)
    p = torch.tensor(top_p, dtype=torch.float32, device=device)
    return _params(torch.where(t > 0, t, 1.0), k, p, t <= 0, np.asarray(keys, dtype=np.uint64))


def _params(t: Tensor, k: Tensor, p: Tensor, greedy: Tensor, keys: np.ndarray) -> Params:
    cut = ((k < 2**62) | (p < 1)) & ~greedy
    heat = torch.where(greedy, 0.0, t).cpu().numpy()
    rows = np.flatnonzero(cut.cpu().numpy())
    return Params(t, k, p, greedy, keys, heat, rows, bool(greedy.all()), bool(len(rows)))


def log_distribution(logits: Tensor, settings: Params) -> Tensor:
    """Log-probs [B, V] float32 of the distribution that is sampled: temperature, top-k, then top-p (renormalised).

    Greedy rows: temperature 1, no truncation. Truncated and masked tokens get -inf. Tokens that tie with the last one
    kept stay; at least one token always does.
    """
    scaled = logits / settings.temperature[:, None]
    if settings.truncates:
        scaled = scaled.masked_fill(scaled < _floor(scaled, settings), -torch.inf)
    return scaled.log_softmax(-1)


def _floor(scaled: Tensor, settings: Params) -> Tensor:
    """The lowest scaled logit [B, 1] that top-k and top-p keep."""
    ranked = _descending(scaled)
    rank = torch.arange(ranked.shape[1], device=scaled.device)[None]
    k = torch.where(settings.greedy, 2**62, settings.top_k)[:, None]
    p = torch.where(settings.greedy, 2.0, settings.top_p)[:, None]
    p = torch.where(p < 1, p, 2.0)
    probs = ranked.masked_fill(rank >= k, -torch.inf).softmax(-1)
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    kept = ((before < p) & (rank < k)).sum(-1, keepdim=True).clamp_min(1)
    return ranked.gather(1, kept - 1)


def _descending(x: Tensor) -> Tensor:
    """Rows sorted from high to low; numpy's vectorised sort is ten times faster than torch's on a CPU."""
    if x.device.type == "cpu":
        return torch.from_numpy(-np.sort(-x.numpy(), axis=-1))
    return x.sort(dim=-1, descending=True).values


def sample(
    logits: Tensor, settings: Params, steps: np.ndarray, masks: Tensor | None = None, phase: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """logits [B, V] float32, steps uint64 [B] -> ids int64 [B], log-probs [B].

    masks float32 [M, V] (0 or -inf), phase int32 [B]: which of them is added to each row.
    """
    lib = native.library(SOURCE) if logits.device.type == "cpu" else None
    if lib is not None:
        ids, logprobs = _native(lib, logits, settings, steps, masks, phase)
        cut = settings.cut.tolist()
        if cut:  # only these rows: what a row gets may not depend on whether a neighbour truncates
            where = None if phase is None else phase[cut]
            ids[cut], logprobs[cut] = _torch(logits[cut], settings.take(cut), steps[cut], masks, where)
        return ids, logprobs
    return _torch(logits, settings, steps, masks, phase)


def _torch(
    logits: Tensor, settings: Params, steps: np.ndarray, masks: Tensor | None, phase: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    if masks is not None:
        logits = logits + masks.index_select(0, torch.as_tensor(phase, dtype=torch.int64).to(logits.device))
    if settings.all_greedy:
        ids = logits.argmax(-1)
        return ids, logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
    logp = log_distribution(logits, settings)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    u = torch.from_numpy(uniforms(settings.keys, steps)).to(logits.device)[:, None]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf, target, right=True)[:, 0]
    ids = torch.where(settings.greedy, logits.argmax(-1), drawn)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def _native(
    lib: Any, logits: Tensor, settings: Params, steps: np.ndarray, masks: Tensor | None, phase: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    held = logits.contiguous()
    ids, logprobs = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.float32)
    u = uniforms(settings.keys, steps)
    where = np.zeros(rows, dtype=np.int32) if phase is None else np.ascontiguousarray(phase, dtype=np.int32)
    done = lib.gn_sample(
        Pointer(held.data_ptr()), rows, vocab, None if masks is None else Pointer(masks.data_ptr()), pointer(where),
        pointer(settings.heat), pointer(u), pointer(ids), pointer(logprobs),
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory to sample from {vocab} tokens")
    return torch.from_numpy(ids), torch.from_numpy(logprobs)
