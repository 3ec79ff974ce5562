"""fit(): the only training loop of gnomon. Recipes pass in what a step's losses are; the loop owns the stepping."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnomon.base.errors import GnomonError
from gnomon.training.parallel import whole
from gnomon.training.team import ALONE, Team

Loss = tuple[Tensor, dict[str, float]]
Losses = Callable[[int], Iterable[Loss]]


class DivergedError(GnomonError):
    """Too many losses or gradients were not finite."""


class UnstableError(DivergedError):
    """So many steps of late were not finite that going on is no use.

    step: the last one. skipped: steps that this `fit` has left out, None = it was not the steps.
    """

    def __init__(self, step: int, why: str, skipped: int | None = None) -> None:
        super().__init__(f"{why} (step {step}); lower the learning rate or look at the batch")
        self.step, self.why, self.skipped = step, why, skipped


class OutOfMemory(GnomonError):
    """A micro-batch does not fit, not even halved."""


@dataclass(frozen=True)
class Patience:
    """How many steps may have a loss or gradient that is not finite: in a row, and as a share of a window of steps."""

    in_a_row: int = 20
    share: float = 1.0
    window: int = 500


def each(step_loss: Callable[[int], Loss], accumulate: int = 1) -> Losses:
    """Losses of a step as the mean over `accumulate` micro-batches; micro-batch `i` of a step is number
    accumulate × step + i."""
    assert accumulate >= 1, "accumulate counts micro-batches per optimiser step"

    def losses(step: int) -> Iterable[Loss]:
        for i in range(accumulate):
            loss, parts = step_loss(step * accumulate + i)
            yield loss / accumulate, {name: part / accumulate for name, part in parts.items()}

    return losses


def fit(
    losses: Losses,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    *,
    schedule: Callable[[float], float] | None = None,
    clip: float | None = 1.0,
    start: int = 0,
    on_step: Callable[[int, dict[str, Any]], bool | None] | None = None,
    on_memory: Callable[[], bool] | None = None,
    patience: Patience = Patience(),
    team: Team = ALONE,
    factor: float = 1.0,
) -> dict[str, Any]:
    """Run optimiser steps `start` .. `steps` - 1 (a resumed run starts where its checkpoint ended).

    losses(step): the micro-batches of a step on this process, each (loss, named parts); the step's loss and parts are
    their sums over micro-batches and processes. `each` makes it from a function of one micro-batch.
    schedule: fraction of training done in [0, 1) -> factor on every group's initial learning rate.
    clip: global gradient norm over all optimisers; None = measured, not clipped.
    on_step(step, row): after every step (1-based) with the parts and `loss, lr, grad_norm, skipped`; True stops.
    on_memory(): a micro-batch did not fit; True = it was made smaller, the step is tried again.
    factor: on every loss before its gradient (see `Parallel.factor`).
    A step with a loss or gradient that is not finite changes no parameter and is counted.
    Returns {steps, skipped, seconds, stopped, last}. Raises UnstableError when `patience` is over, OutOfMemory.
    """
    groups = [g for opt in optimizers for g in opt.param_groups]
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
    params = [p for g in groups for p in g["params"]]
    began, watch, stopped, done = time.monotonic(), _Watch(patience), False, start
    row: dict[str, Any] = {}
    for step in range(start, steps):
        factor_now = 1.0 if schedule is None else schedule(step / steps)
        for group in groups:
            group["lr"] = group["initial_lr"] * factor_now
        parts = team.total(_gradients(losses, step, factor, optimizers, on_memory))
        norm = _grad_norm(params, clip)
        if good := math.isfinite(parts["loss"]) and math.isfinite(norm):
            for opt in optimizers:
                opt.step()
        _clear(optimizers)
        done = step + 1
        watch.saw(done, good)
        row = {**parts, "lr": groups[0]["lr"] if groups else 0.0, "grad_norm": norm, "skipped": watch.skipped}
        if on_step is not None and on_step(done, row):
            stopped = True
            break
    return {
        "steps": done,
        "skipped": watch.skipped,
        "seconds": time.monotonic() - began,
        "stopped": stopped,
        "last": row,
    }


class _Watch:
    """Counts the steps that were skipped."""

    def __init__(self, patience: Patience) -> None:
        self.patience, self.skipped, self.in_a_row = patience, 0, 0
        self._window: deque[bool] = deque(maxlen=patience.window)

    def saw(self, step: int, good: bool) -> None:
        self.skipped += not good
        self.in_a_row = 0 if good else self.in_a_row + 1
        self._window.append(good)
        bad = self._window.count(False)
        why = None
        if self.in_a_row >= self.patience.in_a_row:
            why = f"loss or gradient was not finite in {self.in_a_row} steps in a row"
        elif bad > max(self.patience.share * self.patience.window, self.patience.in_a_row):
            why = f"loss or gradient was not finite in {bad} of the last {len(self._window)} steps"
        if why:
            raise UnstableError(step, why, self.skipped)


def _gradients(
    losses: Losses,
    step: int,
    factor: float,
    optimizers: list[torch.optim.Optimizer],
    on_memory: Callable[[], bool] | None,
) -> dict[str, float]:
    """Add up the gradients of one step. Losses that are not finite go backward too: a team must stay in step."""
    while True:
        sums = {"loss": 0.0}
        try:
            for loss, parts in losses(step):
                for name, part in {**parts, "loss": loss.detach()}.items():
                    sums[name] = sums.get(name, 0.0) + float(part)
                (loss * factor if factor != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
            return sums
        except RuntimeError as error:
            if not _is_memory(error):
                raise
            why = str(error).splitlines()[0][:200]
        # Outside of `except`: the traceback would keep the tensors that did not fit.
        _clear(optimizers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if on_memory is None or not on_memory():
            raise OutOfMemory(f"step {step + 1} does not fit into memory ({why}); lower micro_rows, rows or row_length")


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _clear(optimizers: list[torch.optim.Optimizer]) -> None:
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)


def _grad_norm(params: list[Tensor], clip: float | None) -> float:
    held = [p for p in params if p.grad is not None]
    if not held:
        return 0.0
    return float(whole(torch.nn.utils.clip_grad_norm_(held, math.inf if clip is None else clip)))
