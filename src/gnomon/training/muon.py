"""Muon for many matrices at once: those of one shape go through the Newton-Schulz iteration as a stack.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the numbers and the state
(`momentum_buffer`) are those of torch.optim.Muon, so that checkpoints of either are read by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from gnomon.base.errors import ConfigError

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)  # quintic with the largest slope at 0
STEPS: Final = 5
EPS: Final = 1e-7
Orthogonalise = Callable[[Sequence[Tensor]], list[Tensor]]


def orthogonalised(updates: Sequence[Tensor]) -> list[Tensor]:
    """Nearly orthogonal matrices with the singular vectors of `updates`, singular values about .7 to 1.2.

    updates: matrices of any shapes, whole ones (gather sharded ones first) -> bfloat16, in the same order. A pure
    function. bfloat16 as in the source: it is what torch does, and four times as fast as float32 here (docs/log.md).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, update in enumerate(updates):
        groups.setdefault((min(update.shape), max(update.shape)), []).append(i)
    found: list[Tensor] = [torch.empty(0)] * len(updates)
    for members in groups.values():
        tall = [updates[i].shape[0] > updates[i].shape[1] for i in members]
        stack = torch.stack([updates[i].T if t else updates[i] for i, t in zip(members, tall, strict=True)])
        x = newton_schulz(stack.bfloat16())
        for i, t, one in zip(members, tall, x, strict=True):
            found[i] = one.T if t else one
    return found


def newton_schulz(x: Tensor) -> Tensor:
    """x [K, small, large] in any float type -> the iteration's result; each matrix is scaled to norm 1 first."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(EPS)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov), orthogonalised. For the matrices of hidden layers; no weight decay.

    orthogonalise: takes all updates of a group and gives their orthogonal versions; for sharded parameters a function
    that gathers, calls `orthogonalised` and shards again.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        orthogonalise: Orthogonalise = orthogonalised,
    ) -> None:
        params = list(params)
        for p in params:
            if p.ndim != 2:
                raise ConfigError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}; give it to AdamW.")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.orthogonalise = orthogonalise

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = self.orthogonalise(torch._foreach_lerp(gradients, buffers, group["momentum"]))
            for p, update in zip(params, updates, strict=True):
                rows, columns = p.shape
                p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
