"""fit(): the only training loop of gnomon. Recipes pass in what a step's loss is; the loop owns the stepping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gnomon.base.errors import GnomonError

StepLoss = Callable[[int], tuple[Tensor, dict[str, float]]]

MAX_SKIPS_IN_A_ROW = 20


class DivergedError(GnomonError):
    """Too many losses or gradients in a row were not finite."""


def fit(
    step_loss: StepLoss,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    *,
    schedule: Callable[[float], float] | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    start: int = 0,
    on_step: Callable[[int, dict[str, Any]], bool | None] | None = None,
) -> dict[str, Any]:
    """Run optimiser steps `start` .. `steps` - 1 (a resumed run starts where its checkpoint ended).

    step_loss(micro): loss (scalar) and named parts of micro-batch number `micro` (counts accumulate × step + i).
    schedule: fraction of training done in [0, 1) -> factor on every group's initial learning rate.
    clip: global gradient norm over all optimisers; None = measured, not clipped.
    on_step(step, row): after every step (1-based) with the means of the parts and `loss, lr, grad_norm, skipped`;
    returning True stops. A step with a loss or gradient that is not finite changes no parameter and is counted.
    Returns {steps, skipped, seconds, stopped, last}. Raises DivergedError after 20 such steps in a row.
    """
    assert accumulate >= 1, "accumulate counts micro-batches per optimiser step"
    groups = [g for opt in optimizers for g in opt.param_groups]
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
    params = [p for g in groups for p in g["params"]]
    began, skipped, in_a_row, stopped, done = time.monotonic(), 0, 0, False, start
    row: dict[str, Any] = {}
    for step in range(start, steps):
        factor = 1.0 if schedule is None else schedule(step / steps)
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        parts, finite = _gradients(step_loss, step, accumulate)
        norm = _grad_norm(params, clip) if finite else math.nan
        if math.isfinite(norm):
            for opt in optimizers:
                opt.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row >= MAX_SKIPS_IN_A_ROW:
                raise DivergedError(
                    f"loss or gradient was not finite in {in_a_row} steps in a row (step {step + 1}); "
                    "lower the learning rate or look at the batch"
                )
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        done = step + 1
        row = {**parts, "lr": groups[0]["lr"] if groups else 0.0, "grad_norm": norm, "skipped": skipped}
        if on_step is not None and on_step(done, row):
            stopped = True
            break
    return {"steps": done, "skipped": skipped, "seconds": time.monotonic() - began, "stopped": stopped, "last": row}


def _gradients(step_loss: StepLoss, step: int, accumulate: int) -> tuple[dict[str, float], bool]:
    """Accumulate the gradients of one step; parts are means over micro-batches. False: a loss was not finite."""
    sums: dict[str, float] = {}
    for i in range(accumulate):
        loss, parts = step_loss(step * accumulate + i)
        value = float(loss.detach())
        for name, part in {**parts, "loss": value}.items():
            sums[name] = sums.get(name, 0.0) + part / accumulate
        if not math.isfinite(value):
            return sums, False
        (loss / accumulate).backward()  # type: ignore[no-untyped-call]
    return sums, True


def _grad_norm(params: list[Tensor], clip: float | None) -> float:
    held = [p for p in params if p.grad is not None]
    return float(torch.nn.utils.clip_grad_norm_(held, math.inf if clip is None else clip)) if held else 0.0
