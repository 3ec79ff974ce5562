"""What a metacognitive layer does to a base inside a thought: low-rank side adapters and a feedback gate.

One object for training and serving. Positions that are not steered get back the very numbers that they had: everything
up to and including the think tag, end tags, answers, and sequences without a thought (decisions.md §6).
Legend: B rows, T positions, n streams, C channels, r rank, W gate vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

BETA: Final = 2.0 / 3.0  # temperature and stretch of the hard-concrete gate: Louizos, Welling, Kingma (2018), §2.2
LOW, HIGH = -0.1, 1.1
EPS: Final = 1e-6


class Adapter(NamedTuple):
    """x + z · up (down rms(x)), with log α = weight · rms(x) + bias of the gate z.

    down [r, C], up [C, r], weight [C], bias [].
    """

    down: Tensor
    up: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Steering:
    """gate_layer: the block whose output is multiplied by the gate vector (None: no gate); adapters: by block."""

    gate_layer: int | None
    adapters: Mapping[int, Adapter]

    @property
    def layers(self) -> list[int]:
        """The blocks that are touched, ascending."""
        return sorted({*self.adapters, *(() if self.gate_layer is None else (self.gate_layer,))})

    def on(self, device: torch.device | str) -> Steering:
        """Where the base computes: itself if it is there (compiled bases know it again), else a copy."""
        there = torch.device(device)
        if all(t.device == there for a in self.adapters.values() for t in a):
            return self
        return Steering(self.gate_layer, {k: Adapter(*(t.to(there) for t in a)) for k, a in self.adapters.items()})


@dataclass(eq=False)
class Steer:
    """One pass: who is steered, and by which gate vector.

    vectors float32 [W, C] (not read without a gate). at: for passes in slots a flat list, one number a token; else
    int64 [B, T]. The number is the row's vector, -1 where nothing is done. noise: draws the adapters' gates (training);
    None = their deterministic value. seen: log α [tokens] and gates [tokens] of every adapter, where `record` is set.
    """

    steering: Steering
    vectors: Tensor
    at: Sequence[int] | Tensor
    noise: torch.Generator | None = None
    record: bool = False
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether no token of the pass is steered."""
        return not bool((self.at >= 0).any()) if isinstance(self.at, Tensor) else max(self.at, default=-1) < 0

    def on_grid(self, counts: Sequence[int], rows: int, width: int, device: torch.device) -> Steer:
        """The same for padded rows [rows, width] whose first counts[r] columns are the tokens."""
        assert not isinstance(self.at, Tensor)
        grid = torch.full((rows, width), -1, dtype=torch.int64)
        start = 0
        for row, count in enumerate(counts):
            grid[row, :count] = torch.tensor(self.at[start : start + count], dtype=torch.int64)
            start += count
        return Steer(self.steering, self.vectors.to(device), grid.to(device), self.noise, self.record, self.seen)

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Output of block `index`, [B, T, C] or [B, T, n, C] -> the same, steered where `at` says so."""
        adapter = self.steering.adapters.get(index)
        gated = index == self.steering.gate_layer
        if adapter is None and not gated:
            return x
        assert isinstance(self.at, Tensor), "lay the pass out with `on_grid` first"
        # The whole grid, not the steered tokens gathered: a product of another shape rounds differently, and a row
        # must not notice whether its neighbours are steered (decisions.md §7).
        inside = self.at >= 0
        streams = x.ndim == 4
        held = x
        if adapter is not None:
            delta, logit, gate = adapted((x.mean(-2) if streams else x).float(), adapter, self.noise)
            if self.record and bool(inside.any()):
                self.seen[index] = (logit[inside], gate[inside])
            held = held + (delta.unsqueeze(-2) if streams else delta).to(held.dtype)
        if gated:
            vector = self.vectors.to(held.dtype)[self.at.clamp_min(0)]
            held = held * (vector.unsqueeze(-2) if streams else vector)
        return torch.where(inside.view(*inside.shape, *[1] * (x.ndim - 2)), held, x)


def adapted(x: Tensor, adapter: Adapter, noise: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """States [*, C] -> what is added to them [*, C], log α [*], gates in [0, 1] [*]."""
    h = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    logit = h @ adapter.weight + adapter.bias
    gate = hard_concrete(logit, noise)
    return gate.unsqueeze(-1) * ((h @ adapter.down.T) @ adapter.up.T), logit, gate


def hard_concrete(logit: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """log α -> a gate in [0, 1]: drawn (Louizos et al. 2018, eq. 10 and 11), or its deterministic value (eq. 13)."""
    if noise is None:
        soft = torch.sigmoid(logit)
    else:
        u = torch.rand(logit.shape, generator=noise, device=noise.device).to(logit).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((u.log() - (-u).log1p() + logit) / BETA)
    return (soft * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def expected_l0(logit: Tensor) -> Tensor:
    """log α -> probability that the drawn gate is not zero (Louizos et al. 2018, eq. 12)."""
    return torch.sigmoid(logit - BETA * torch.tensor(-LOW / HIGH).log())


@contextmanager
def steered(blocks: Sequence[nn.Module], steer: Steer | None) -> Iterator[dict[int, Tensor]]:
    """For one forward pass of a Hugging Face model: hooks on the blocks that are touched, removed afterwards.

    Yields a dictionary that the pass fills: block -> its steered output.
    """
    found: dict[int, Tensor] = {}
    hooks = []

    def hook(index: int) -> Any:
        def run(_: nn.Module, __: Any, output: Any) -> Any:
            assert steer is not None
            first = output[0] if isinstance(output, tuple) else output
            found[index] = steer(index, first)
            return (found[index], *output[1:]) if isinstance(output, tuple) else found[index]

        return run

    try:
        if steer is not None and not steer.idle:
            for index in steer.steering.layers:
                hooks.append(blocks[index].register_forward_hook(hook(index)))
        yield found
    finally:
        for handle in hooks:
            handle.remove()
