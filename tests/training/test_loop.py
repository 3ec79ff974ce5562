"""fit(): accumulation, schedule, clipping, early stop, and losses that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.training.loop import DivergedError, each, fit


def parameter(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value]))


def test_accumulation_equals_one_large_batch() -> None:
    data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ends = []
    for accumulate, parts in ((1, [data]), (4, list(data.split(1)))):
        p = parameter(0.5)
        seen: list[int] = []

        def loss(
            micro: int, p: Tensor = p, parts: Any = parts, seen: list[int] = seen
        ) -> tuple[Tensor, dict[str, float]]:
            seen.append(micro)
            return (p * parts[micro % len(parts)] - 1.0).square().mean(), {}

        result = fit(each(loss, accumulate), [torch.optim.SGD([p], lr=0.01)], 3, clip=None)
        assert seen == list(range(3 * accumulate))
        assert result["steps"] == 3
        ends.append(float(p.detach()))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_schedule_scales_every_group_and_clip_bounds_the_step() -> None:
    p, q = parameter(), parameter()
    opts = [torch.optim.SGD([p], lr=1.0), torch.optim.SGD([q], lr=0.1)]
    rates = []
    fit(
        each(lambda _: ((p + q).sum() * 100.0, {})),
        opts,
        2,
        schedule=lambda done: 1.0 - done,
        clip=1.0,
        on_step=lambda _, row: rates.append((row["lr"], round(row["grad_norm"], 3))),
    )
    assert rates == [(1.0, 141.421), (0.5, 141.421)]
    assert float(p.detach()) == pytest.approx(1.0 - 1.5 / math.sqrt(2.0), rel=1e-4)
    assert float(q.detach()) == pytest.approx(1.0 - 0.15 / math.sqrt(2.0), rel=1e-4)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str) -> None:
    p = parameter()
    opt = torch.optim.AdamW([p], lr=0.1)
    values = []

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == 1:
            return (p.sum() * math.nan if bad == "loss" else (p - p.detach()).abs().sqrt().sum()), {}
        return p.square().sum(), {}

    result = fit(each(loss), [opt], 3, on_step=lambda *_: values.append(float(p.detach())))
    assert result["skipped"] == 1
    assert values[0] == values[1] != values[2]
    assert math.isfinite(values[2])


def test_divergence_is_reported_and_true_stops() -> None:
    p = parameter()
    with pytest.raises(DivergedError, match="learning rate"):
        fit(each(lambda _: (p.sum() * math.inf, {})), [torch.optim.SGD([p], lr=0.1)], 100)
    result = fit(
        each(lambda _: (p.square().sum(), {"x": 2.0})),
        [torch.optim.SGD([p], lr=0.1)],
        100,
        on_step=lambda step, _: step == 7,
    )
    assert (result["steps"], result["stopped"], result["last"]["x"]) == (7, True, 2.0)
