"""Cross-entropy of the trained tokens alone: rows without a target never reach the vocabulary.

Legend: N positions, V vocabulary, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gnomon.model import fused

IGNORED = -100


def token_loss(states: Tensor, unembed: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Sum of the cross-entropy in nats over the trained targets, and how many these are.

    states [..., C]: the normed last states (`DecoderOutput.hidden`); unembed [V, C]; targets int64 [...], -100 = not
    trained. -> (float32 scalar, count); divide for the mean. A part of the rows is computed at a time and its gradient
    kept instead of its logits (as in Liger kernels, arXiv 2410.10989), so that memory does not grow with N × V.
    Products are float32, or what autocast says.
    """
    flat, wanted = states.flatten(0, -2), targets.flatten()
    rows = (wanted != IGNORED).nonzero().flatten()
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else flat.dtype
    picked = flat.index_select(0, rows) if len(rows) < len(flat) else flat
    return _TokenLoss.apply(picked, unembed, wanted[rows], dtype), len(rows)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, unembed: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        weight, total = unembed.to(dtype), states.new_zeros((), dtype=torch.float32)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        back = torch.empty_like(states) if needed else None
        gweight = torch.zeros_like(unembed, dtype=torch.float32) if needed else None
        many = _rows(states.device.type, len(weight))
        for at in range(0, len(states), many):
            part, target = states[at : at + many].to(dtype), targets[at : at + many, None]
            logits = fused.product(part, weight).float()
            top = logits.logsumexp(-1, keepdim=True)
            total += (top - logits.gather(-1, target)).sum()
            if back is None or gweight is None:
                continue
            g = logits.sub_(top).exp_()
            g.scatter_add_(-1, target, g.new_full(target.shape, -1.0))
            g = g.to(dtype)
            back[at : at + many] = fused.product(g, weight.t())
            gweight += fused.product_of_tokens(g, part)
        ctx.save_for_backward(back, None if gweight is None else gweight.to(unembed.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        back, gweight = ctx.saved_tensors
        return (g.to(back.dtype) * back if ctx.needs_input_grad[0] else None,
                g.to(gweight.dtype) * gweight if ctx.needs_input_grad[1] else None, None, None)  # fmt: skip


def _rows(device: str, vocabulary: int) -> int:
    """Rows at a time: their logits stay in a CPU's cache, or are a large product for a GPU."""
    return max(64, (2**19 if device == "cpu" else 2**26) // vocabulary)
