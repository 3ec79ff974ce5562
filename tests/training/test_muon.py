"""Muon against torch's, on many shapes at once; what it does to singular values; its place in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gnomon.base import seeds
from gnomon.base.errors import ConfigError
from gnomon.training.muon import Muon, newton_schulz, orthogonalised

SHAPES = ((16, 48), (48, 16), (16, 16), (16, 48), (20, 7), (1, 5))


def matrices(name: str) -> list[Tensor]:
    return [torch.randn(s, generator=seeds.torch_generator("muon", name, i)) for i, s in enumerate(SHAPES)]


def pair() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    start = matrices("start")
    return [nn.Parameter(x.clone()) for x in start], [nn.Parameter(x.clone()) for x in start]


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], numbers: Sequence[int]) -> None:
    for n in numbers:
        for p, g in zip(params, matrices(f"gradient {n}"), strict=True):
            p.grad = g
        optimizer.step()


def test_the_steps_are_those_of_torch() -> None:
    """Rounding in bfloat16 may differ between one matrix and a stack: 1 % of a step."""
    mine, theirs = pair()
    start = [p.detach().clone() for p in mine]
    steps(Muon(mine, lr=0.1, momentum=0.9), mine, range(3))
    steps(torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.0), theirs, range(3))
    for a, b, was in zip(mine, theirs, start, strict=True):
        assert (a - b).abs().max() <= 0.01 * (b - was).abs().max()


def test_each_reads_the_others_state() -> None:
    mine, theirs = pair()
    first, second = Muon(mine, lr=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    steps(first, mine, range(2))
    for p, q in zip(mine, theirs, strict=True):
        assert set(first.state[p]) == {"momentum_buffer"}
        second.state[q]["momentum_buffer"] = first.state[p]["momentum_buffer"].clone()
        q.data.copy_(p.data)
    steps(first, mine, [2])
    steps(second, theirs, [2])
    assert all((a - b).abs().max() < 1e-2 * a.abs().max() for a, b in zip(mine, theirs, strict=True))


def test_singular_values() -> None:
    """In float64: singular vectors stay, singular values go to about .7 .. 1.2 (the source's figure 4)."""
    x = matrices("singular")[0].double()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    found = u.T @ newton_schulz(x[None])[0] @ vt.T
    assert (found - found.diag().diag()).abs().max() < 1e-9
    assert s.max() / s.min() > 2 and found.diag().min() > 0.6 and found.diag().max() < 1.3
    low = orthogonalised([x.float()])[0]
    assert (low - newton_schulz(x[None])[0]).abs().max() < 0.03


def test_the_updates_are_pure_and_can_be_taken_over() -> None:
    given = matrices("pure")
    before = [g.clone() for g in given]
    assert [x.shape for x in orthogonalised(given)] == [g.shape for g in given]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    mine, other = pair()
    seen: list[int] = []

    def gathering(updates: Sequence[Tensor]) -> list[Tensor]:
        seen.append(len(updates))
        return orthogonalised(updates)

    steps(Muon(mine, lr=0.1, orthogonalise=gathering), mine, [0])
    steps(Muon(other, lr=0.1), other, [0])
    assert seen == [len(SHAPES)] and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_without_a_gradient_nothing_moves() -> None:
    mine, _ = pair()
    optimizer = Muon(mine, lr=0.1)
    before = mine[1].detach().clone()
    mine[0].grad = matrices("one")[0]
    optimizer.step()
    assert torch.equal(mine[1], before) and list(optimizer.state) == [mine[0]]
    assert not torch.equal(mine[0], matrices("start")[0])


def test_a_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"matrices, not a parameter of shape \(4,\); give it to AdamW"):
        Muon([nn.Parameter(torch.zeros(4))], lr=0.1)
