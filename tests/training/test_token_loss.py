"""The loss over trained tokens alone against cross-entropy over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gnomon.base import seeds
from gnomon.training import token_loss as module
from gnomon.training.token_loss import token_loss


def inputs(trained: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeds.torch_generator("token loss", trained)
    states = torch.randn(3, 90, 16, generator=generator).to(dtype).requires_grad_()
    unembed = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (3, 90), generator=generator)
    targets[torch.rand(3, 90, generator=generator) >= trained] = -100
    return states, unembed, targets


@pytest.mark.parametrize("rows", [7, 64, 1000])
@pytest.mark.parametrize("trained", [0.2, 1.0])
def test_value_and_gradients(trained: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are computed at a time, and under a factor on the loss."""
    monkeypatch.setattr(module, "_rows", lambda *_: rows)
    states, unembed, targets = inputs(trained)
    total, count = token_loss(states, unembed, targets)
    assert count == int((targets != -100).sum())
    found = torch.autograd.grad(total * 0.3 / count, (states, unembed))
    wide = [x.detach().double().requires_grad_() for x in (states, unembed)]
    wanted = F.cross_entropy((wide[0] @ wide[1].T).flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert float(total.detach() / count) == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in zip(found, torch.autograd.grad(wanted * 0.3, wide), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 1e-5 * b.abs().max()
    assert not found[0][targets == -100].any()


def test_bfloat16_under_autocast() -> None:
    states, unembed, targets = inputs(0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = token_loss(states, unembed, targets)
    wanted = F.cross_entropy((states @ unembed.T).flatten(0, 1), targets.flatten(), reduction="sum")
    assert total.dtype == torch.float32 and total.item() == pytest.approx(wanted.item(), rel=5e-3)
    for a, b in zip(
        torch.autograd.grad(total, (states, unembed)), torch.autograd.grad(wanted, (states, unembed)), strict=True
    ):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.03 * b.abs().max()


def test_without_targets_the_sum_is_zero_and_so_are_the_gradients() -> None:
    states, unembed, targets = inputs(0.0)
    total, count = token_loss(states, unembed, targets)
    assert (float(total.detach()), count) == (0.0, 0)
    assert not any(g.any() for g in torch.autograd.grad(total, (states, unembed)))


def test_without_gradients_only_the_value_is_made() -> None:
    states, unembed, targets = inputs(0.5)
    with torch.no_grad():
        total, _ = token_loss(states, unembed, targets)
    assert not total.requires_grad
    assert torch.equal(total, token_loss(states, unembed, targets)[0].detach())
