"""Heads + card -> decisions. The engine calls `plan`, `budget`, `running` and `after`; nothing else interprets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnomon.base.errors import ModelError, unknown
from gnomon.metacognition.calibration import Card, Floats, clip_tokens, numbers
from gnomon.metacognition.config import BOUNDARY, END, PROMPT, THINK_SITE
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.native import NativeDistance, NativeHeads, available


@dataclass(frozen=True)
class PlanDecision:
    """plan: the chosen strategy; probs: strategy -> probability that it is the cheapest solver."""

    plan: str
    probs: dict[str, float]


@dataclass(frozen=True)
class BudgetDecision:
    """predicted: expected think tokens, before clipping; clipped: whole tokens, never negative.

    confidence: probability of a right answer, None when unknown; calibrated: the card holds for this prompt and plan.
    raw: the confidence logit (for fitting only); distance: of the state from the card's domain, None without a card
    and where it is no number.
    """

    predicted: float
    clipped: int
    confidence: float | None
    calibrated: bool
    raw: float
    distance: float | None = None


@dataclass(frozen=True)
class AfterDecision:
    """confidence after thinking, None when unknown; raw: its logit."""

    confidence: float | None
    calibrated: bool
    raw: float


@dataclass(frozen=True)
class RunningDecision:
    """At a boundary: remaining think tokens expected, their conformal upper bound in whole tokens, never negative.

    confidence: probability of a right answer, None when unknown; raw: its logit.
    """

    remaining: float
    upper: int
    confidence: float | None
    raw: float


@dataclass(frozen=True)
class Decision:
    """Everything known before thinking starts, for one prompt (`ask --no-decode`).

    sampling: decoding policy; None = identity, the sampler's own settings.
    """

    plan: str
    plan_probs: dict[str, float]
    budget_predicted: float
    budget_clipped: int
    confidence: float | None
    calibrated: bool
    sampling: None = None


class Raw(NamedTuple):
    """What the heads say: plan logits [N, K], budget [N] in log1p(tokens), confidence [N] logit; float64.

    solve (logits), cost (log1p(tokens)) [N, K]: the plans' values, None without them.
    """

    plan: Floats
    budget: Floats
    confidence: Floats
    solve: Floats | None = None
    cost: Floats | None = None


class Decider:
    """Implements the engine's metacognition protocol; batched, without gradients, deterministic.

    Without a card plans are the most probable ones, budgets are not clipped upwards, confidence is unknown. Readings
    that are no numbers raise ModelError.
    """

    def __init__(self, heads: MetacogHeads, card: Card | None = None) -> None:
        if card is not None and card.plans != heads.config.plans:
            raise ModelError(f"the card knows the plans {card.plans}, the heads know {heads.config.plans}")
        self.heads = heads.eval()
        self.card = card
        self.plans = heads.config.plans
        self._native = NativeHeads(self.heads) if available(self.heads) else None  # a copy: heads do not change here
        self._distance: Callable[[Floats], Floats] | None = None
        if card is not None:
            self._distance = card.domain.distance if self._native is None else NativeDistance(card.domain)

    @property
    def reads_boundaries(self) -> bool:
        """Whether the card knows how to read states at boundaries."""
        return self.card is not None and self.card.running is not None

    def plan(self, taps: Tensor) -> list[PlanDecision]:
        """taps [B, L, C] at the last prompt token -> one PlanDecision per row."""
        out = self._read(taps, PROMPT)
        logits = out.plan
        probs = np.exp(logits - logits.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)
        chosen = probs.argmax(1) if self.card is None else self.card.choose_plan(probs, out.solve, out.cost)
        return [
            PlanDecision(self.plans[int(k)], dict(zip(self.plans, map(float, row), strict=True)))
            for k, row in zip(chosen, probs, strict=True)
        ]

    def budget(
        self, taps: Tensor, plans: Sequence[str], predicted_plans: Sequence[str] | None = None
    ) -> list[BudgetDecision]:
        """taps [B, L, C] at the think tag under `plans` -> one BudgetDecision per row.

        predicted_plans: what `plan` had chosen, where a user chose otherwise (then confidence is unknown).
        """
        self._check(plans, taps)
        wished = list(predicted_plans) if predicted_plans is not None else list(plans)
        out = self._read(taps, THINK_SITE)
        raw, logits = out.budget, out.confidence
        predicted = np.maximum(np.expm1(np.minimum(raw, 16.0)), 0.0)
        if self.card is None:
            clipped = clip_tokens(raw, 0.0)
            return [
                BudgetDecision(float(p), int(c), None, False, float(r))
                for p, c, r in zip(predicted, clipped, logits, strict=True)
            ]
        clipped = self.card.clip_budget(raw)
        probs = self.card.confidence(logits, "before")
        assert self._distance is not None
        distance = self._distance(_numpy(taps[:, self.card.domain.layer]))
        rows = []
        for i, plan in enumerate(plans):
            near = bool(distance[i] <= self.card.domain.threshold)  # a distance that is no number is foreign
            known = near and self.card.covers(plan, predicted_plan=wished[i])
            rows.append(
                BudgetDecision(
                    predicted=float(predicted[i]),
                    clipped=int(clipped[i]),
                    confidence=float(probs[i]) if known else None,
                    calibrated=known,
                    raw=float(logits[i]),
                    distance=float(distance[i]) if np.isfinite(distance[i]) else None,
                )
            )
        return rows

    def after(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> list[AfterDecision]:
        """taps [B, L, C] at the end tag, think tokens used -> confidence after thinking, one per row.

        calibrated: the rows' flags from `budget`, lowered by the caller where the effective budget was not the
        clipped prediction; by default only the plan is judged.
        """
        self._check(plans, taps)
        logits = self._read(taps, END, torch.tensor(list(used), dtype=torch.float32)).confidence
        if self.card is None:
            return [AfterDecision(None, False, float(r)) for r in logits]
        probs = self.card.confidence(logits, "after")
        flags = [True] * len(plans) if calibrated is None else list(calibrated)
        known = [bool(f) and self.card.covers(p) for f, p in zip(flags, plans, strict=True)]
        return [
            AfterDecision(float(p) if k else None, k, float(r)) for p, k, r in zip(probs, known, logits, strict=True)
        ]

    def running(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> list[RunningDecision]:
        """taps [B, L, C] at node boundaries, think tokens used so far -> what is still needed, one per row.

        calibrated: the rows' flags from `budget`; by default only the plan is judged. Raises ModelError where
        `reads_boundaries` is false.
        """
        if self.card is None or self.card.running is None:
            raise ModelError("this layer has no calibration at boundaries; label, train and calibrate it again")
        assert len(plans) == taps.shape[0] == len(used), "one plan and one count per row"
        out = self._read(taps, BOUNDARY, torch.tensor(list(used), dtype=torch.float32))
        remaining = np.maximum(np.expm1(np.minimum(out.budget, 16.0)), 0.0)
        upper, probs = self.card.running.upper(out.budget), self.card.running.confidence(out.confidence)
        flags = [True] * len(plans) if calibrated is None else list(calibrated)
        return [
            RunningDecision(float(r), int(u), float(p) if f and self.card.covers(plan) else None, float(z))
            for r, u, p, z, f, plan in zip(remaining, upper, probs, out.confidence, flags, plans, strict=True)
        ]

    def _read(self, taps: Tensor, site: int, used: Tensor | None = None) -> Raw:
        raw = self._say(taps, site, used)
        numbers(*raw)
        return raw

    @torch.no_grad()
    def _say(self, taps: Tensor, site: int, used: Tensor | None = None) -> Raw:
        if self._native is not None:
            out = self._native(taps.cpu(), site, used)
            read = (out.plan_logits, out.budget_raw, out.conf_raw, out.solve_logits, out.cost_raw)
            return Raw(*(None if x is None else x.astype(np.float64) for x in read))  # type: ignore[arg-type]
        device = self.heads.layer_index.device
        n = taps.shape[0]
        tokens = torch.zeros(n) if used is None else used
        where = torch.full((n,), site, dtype=torch.int64, device=device)
        full = self.heads(taps.to(device), where, tokens.to(device))
        values = (None if x is None else _numpy(x) for x in (full.solve_logits, full.cost_raw))
        return Raw(_numpy(full.plan_logits), _numpy(full.budget_raw), _numpy(full.conf_raw), *values)

    def _check(self, plans: Sequence[str], taps: Tensor) -> None:
        for name in plans:
            if name not in self.plans:
                raise unknown("plan", name, self.plans)
        assert len(plans) == taps.shape[0], "one plan per row"


def combine(plan: PlanDecision, budget: BudgetDecision) -> Decision:
    """The two readings of one prompt as one Decision."""
    return Decision(
        plan=plan.plan,
        plan_probs=plan.probs,
        budget_predicted=budget.predicted,
        budget_clipped=budget.clipped,
        confidence=budget.confidence,
        calibrated=budget.calibrated,
    )


def _numpy(x: Tensor) -> Floats:
    return x.detach().double().cpu().numpy()
