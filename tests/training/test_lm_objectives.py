"""Every loss of the base alone, against loops: ragged masks, several tokens of a tag, no tokens, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gnomon.base.seeds import torch_generator
from gnomon.training import lm_objectives as lm

B, T, V = 4, 6, 7
DOUBLE = torch.float64
LENGTHS = (6, 3, 0, 1)  # tokens that count in each row: full, ragged, none, one
CE = [lm.answer_ce, lm.think_ce]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch_generator("lm"), dtype=DOUBLE).requires_grad_(True)


@pytest.fixture
def ids() -> torch.Tensor:
    found = torch.randint(V, (B, T), generator=torch_generator("lm-ids"))
    return torch.where(mask(), found, -100)  # what stands outside a mask is never looked at


def mask() -> torch.Tensor:
    return torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]


def logprob(row: list[float], k: int) -> float:
    top = max(row)
    return row[k] - top - math.log(sum(math.exp(x - top) for x in row))


def slow(logits: torch.Tensor, ids: torch.Tensor) -> list[list[float]]:
    """log p of every token that counts, row by row."""
    return [[logprob(logits[b, t].tolist(), int(ids[b, t])) for t in range(LENGTHS[b])] for b in range(B)]


@pytest.mark.parametrize("loss", CE)
def test_token_ce_against_loops(loss: Callable[..., torch.Tensor], logits: torch.Tensor, ids: torch.Tensor) -> None:
    flat = [x for row in slow(logits, ids) for x in row]
    got = loss(logits, ids, mask())
    assert got.item() == pytest.approx(-sum(flat) / len(flat), abs=1e-12)
    (grad,) = torch.autograd.grad(got, logits)
    assert not grad[~mask()].any(), "exactly nothing outside the region"
    own = grad[mask()].gather(1, ids[mask()][:, None])
    assert (own < 0).all() and (grad[mask()].sum(-1).abs() < 1e-12).all()


@pytest.mark.parametrize("loss", CE)
def test_a_batch_without_such_tokens_costs_nothing(loss: Callable[..., torch.Tensor], logits: torch.Tensor) -> None:
    with torch.no_grad():
        logits[0, 0, 0] = -torch.inf  # a masked structure token
    for given in (logits, logits[:0]):
        shape = given.shape[:2]
        got = loss(given, torch.full(shape, -100), torch.zeros(shape, dtype=torch.bool))
        assert got.item() == 0.0 and got.requires_grad
        (grad,) = torch.autograd.grad(got, logits)
        assert not grad.any()


@pytest.mark.parametrize("loss", CE)
def test_half_precision_logits_are_summed_in_single(loss: Callable[..., torch.Tensor]) -> None:
    logits = torch.randn(1, 8, 4096, generator=torch_generator("half")).bfloat16()
    ids = torch.arange(8)[None]
    want = loss(logits.double(), ids, ids >= 0)
    got = loss(logits, ids, ids >= 0)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), abs=1e-5)


def test_token_and_row_logprobs_against_loops(logits: torch.Tensor, ids: torch.Tensor) -> None:
    found = lm.token_logprobs(logits, ids, mask())
    want = slow(logits, ids)
    for b in range(B):
        assert found[b].tolist() == pytest.approx(want[b] + [0.0] * (T - LENGTHS[b]), abs=1e-12)
    rows = lm.row_logprob(found, mask())
    for b in range(B):
        mean = sum(want[b]) / LENGTHS[b] if LENGTHS[b] else math.nan
        assert rows[b].item() == pytest.approx(mean, abs=1e-12, nan_ok=True)
    (grad,) = torch.autograd.grad(torch.nan_to_num(rows).sum(), logits)
    assert torch.isfinite(grad).all() and not grad[~mask()].any()
    nothing = lm.token_logprobs(logits, ids, torch.zeros_like(mask()))
    assert not nothing.any() and nothing.requires_grad


def test_consistency_against_loops() -> None:
    a = torch.tensor([-0.2, -2.0, math.nan, -1.0, -0.5], dtype=DOUBLE, requires_grad=True)
    b = torch.tensor([-1.0, -1.0, -1.0, math.nan, -0.6], dtype=DOUBLE, requires_grad=True)
    for margin in (0.0, 0.3, 2.0):
        gains = [x - y for x, y in zip(a.tolist(), b.tolist(), strict=True) if not math.isnan(x - y)]
        got = lm.consistency(a, b, margin)
        assert got.item() == pytest.approx(sum(max(0.0, margin - g) for g in gains) / 3, abs=1e-12)
        to_a, to_b = torch.autograd.grad(got, [a, b], allow_unused=True)
        assert to_b is None, "the answer without the thought must not become worse"
        for i, g in enumerate(to_a.tolist()):
            held = i not in (2, 3)
            assert g == pytest.approx(-1 / 3 if held and (a - b)[i] < margin else 0.0, abs=1e-12)
    none = lm.consistency(a[2:4], b[2:4])
    assert none.item() == 0.0 and none.requires_grad


def test_consistency_teaches_the_states_of_the_thought() -> None:
    """The chain that a phase builds: logits -> log-probs of one answer -> its mean -> hinge."""
    x = torch.randn(2, T, V, generator=torch_generator("gain"), dtype=DOUBLE)
    ids = torch.randint(V, (2, T), generator=torch_generator("gain-ids"))
    region = torch.arange(T)[None] < torch.tensor([4, 0])[:, None]  # the second row has no answer
    thought, plain = x.clone().requires_grad_(True), (x + 1.0).detach().requires_grad_(True)
    loss = lm.consistency(
        lm.row_logprob(lm.token_logprobs(thought, ids, region), region),
        lm.row_logprob(lm.token_logprobs(plain, ids, region), region),
        margin=0.5,
    )
    assert loss.item() == pytest.approx(0.5), "a constant on all logits changes no probability: no gain"
    to_thought, to_plain = torch.autograd.grad(loss, [thought, plain], allow_unused=True)
    assert to_plain is None and torch.isfinite(to_thought).all()
    assert (to_thought[0, :4].gather(1, ids[0, :4, None]) < 0).all() and not to_thought[1].any()


def test_forced_close_against_loops(logits: torch.Tensor) -> None:
    ids = torch.randint(V, (B, T), generator=torch_generator("close"))
    forced = torch.zeros(B, T, dtype=torch.bool)
    places = [(0, 2), (0, 3), (2, 5)]  # a tag of two tokens, rows without one, a tag of one token
    for b, t in places:
        forced[b, t] = True
    want = [-sum(logprob(logits[b, t].tolist(), int(ids[b, t])) for b, t in places if b == row) for row in (0, 2)]
    got = lm.forced_close(lm.token_logprobs(logits, ids, forced), forced)
    assert got.item() == pytest.approx(sum(want) / 2, abs=1e-12)
    (grad,) = torch.autograd.grad(got, logits)
    assert not grad[~forced].any()
    assert (grad[forced].gather(1, ids[forced][:, None]) < 0).all(), "descent makes the end tag likelier at the cap"
    everywhere = lm.token_logprobs(logits, ids, torch.ones_like(forced))
    assert torch.equal(lm.forced_close(everywhere, forced), got), "other tokens do not enter"
    none = lm.forced_close(everywhere, torch.zeros_like(forced))
    assert none.item() == 0.0 and none.requires_grad
