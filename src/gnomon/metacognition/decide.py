"""Heads + card -> decisions: `plan`, `budget`, `policy`, `running` and `after`. Nothing else interprets the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gnomon.base.errors import ModelError, unknown
from gnomon.metacognition.calibration import Card
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.native import NativeReader, available
from gnomon.metacognition.policy import GRID, Sampling
from gnomon.metacognition.readers import Reader, TorchReader
from gnomon.metacognition.steerer import Steerer


class PlanDecision(NamedTuple):
    """plan: the chosen strategy; probs: strategy -> probability that it is the cheapest solver."""

    plan: str
    probs: dict[str, float]


class BudgetDecision(NamedTuple):
    """predicted: expected think tokens, before clipping; clipped: whole tokens, never negative.

    confidence: probability of a right answer, None when unknown; calibrated: the card holds for this prompt and plan.
    raw: the confidence logit (for fitting only); distance: of the state from the card's domain, None without a card
    and where it is no number. gate: the feedback gate's factors [C], None without one. at_boundaries: the card holds
    for the confidence that is read at this thought's boundaries; promised: probability that the whole thought, without
    a cap, gives a right answer, None where it is unknown (and for heads without `closing`).
    """

    predicted: float
    clipped: int
    confidence: float | None
    calibrated: bool
    raw: float
    distance: float | None = None
    gate: Tensor | None = None
    at_boundaries: bool = False
    promised: float | None = None


class AfterDecision(NamedTuple):
    """confidence after thinking, None when unknown; raw: its logit."""

    confidence: float | None
    calibrated: bool
    raw: float


class RunningDecision(NamedTuple):
    """At a boundary: remaining think tokens expected, their conformal upper bound in whole tokens, never negative.

    confidence: None when unknown; for heads with `closing` the probability that closing here gives a right answer, for
    others that the whole thought does. raw: its logit.
    """

    remaining: float
    upper: int
    confidence: float | None
    raw: float


@dataclass(frozen=True)
class Decision:
    """Everything known before thinking starts, for one prompt (`ask --no-decode`).

    sampling: how to sample inside the thought; None = identity, the sampler's own settings.
    """

    plan: str
    plan_probs: dict[str, float]
    budget_predicted: float
    budget_clipped: int
    confidence: float | None
    calibrated: bool
    sampling: Sampling | None = None


class Decider:
    """Implements the engine's metacognition protocol; batched, without gradients, deterministic.

    Without a card plans are the most probable ones, budgets are not clipped upwards, confidence is unknown. Readings
    that are no numbers raise ModelError.
    """

    def __init__(self, heads: MetacogHeads, card: Card | None = None, steerer: Steerer | None = None) -> None:
        if card is not None and card.plans != heads.config.plans:
            raise ModelError(f"the card knows the plans {card.plans}, the heads know {heads.config.plans}")
        self.heads = heads.eval()
        self.card = card
        self.plans = heads.config.plans
        # A copy in C where that is possible: heads do not change while they decide.
        self.steerer = None if steerer is None else steerer.eval()
        gate = None if steerer is None else steerer.gate
        self.reader: Reader = (NativeReader if available(heads) else TorchReader)(self.heads, card, gate)
        self.steering = None if steerer is None else steerer.steering()
        self._policies = TorchReader(self.heads, card) if heads.config.policy else None

    @property
    def reads_boundaries(self) -> bool:
        """Whether the card knows how to read states at boundaries."""
        return self.card is not None and self.card.running is not None

    @property
    def closes(self) -> bool:
        """Whether the confidence at boundaries is, calibrated, that of closing there."""
        running = None if self.card is None else self.card.running
        return self.heads.config.closing and running is not None and bool(running.closing_plans)

    @property
    def modulates(self) -> bool:
        """Whether the heads know decoding policies; without them `policy` says identity."""
        return self._policies is not None

    def plan(self, taps: Tensor) -> list[PlanDecision]:
        """taps [B, L, C] at the last prompt token -> one PlanDecision per row."""
        plans = self.plans
        return [
            PlanDecision(plans[int(chosen)], dict(zip(plans, probs, strict=True)))
            for chosen, *probs in self.reader.plan(taps)
        ]

    def budget(
        self, taps: Tensor, plans: Sequence[str], predicted_plans: Sequence[str] | None = None
    ) -> list[BudgetDecision]:
        """taps [B, L, C] at the think tag under `plans` -> one BudgetDecision per row.

        predicted_plans: what `plan` had chosen, where a user chose otherwise (then confidence is unknown).
        """
        self._check(plans, taps)
        wished = plans if predicted_plans is None else predicted_plans
        card, rows = self.card, []
        read, gates = self.reader.budget(taps, [self.plans.index(p) for p in plans])
        for i, (row, plan, wish) in enumerate(zip(read, plans, wished, strict=True)):
            expected, clipped, prob, logit, distance = row
            gate = None if gates is None else gates[i]
            # A distance that is no number is foreign.
            home = card is not None and distance <= card.domain.threshold
            known = home and card is not None and card.covers(plan, predicted_plan=wish)
            later = home and self._covers(plan) if self.heads.config.closing else known
            far = distance if math.isfinite(distance) else None
            said = prob if known else None
            promised = card.running.promise(logit) if later and self.closes and card and card.running else None
            rows.append(BudgetDecision(expected, int(clipped), said, known, logit, far, gate, later, promised))
        return rows

    def policy(self, taps: Tensor, plans: Sequence[str]) -> list[Sampling | None]:
        """taps [B, L, C] at the think tag under `plans` -> how to sample inside each thought, None = as asked for."""
        self._check(plans, taps)
        if self._policies is None:
            return [None] * len(plans)
        return [GRID[int(chosen)] for chosen, *_ in self._policies.policy(taps)]

    def after(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> list[AfterDecision]:
        """taps [B, L, C] at the end tag, think tokens used -> confidence after thinking, one per row.

        calibrated: the rows' flags from `budget`, lowered by the caller where the effective budget was not the
        clipped prediction; by default only the plan is judged.
        """
        self._check(plans, taps)
        flags = [True] * len(plans) if calibrated is None else calibrated
        rows = []
        for (prob, logit), plan, flag in zip(self.reader.after(taps, used), plans, flags, strict=True):
            known = self.card is not None and flag and self.card.covers(plan)
            rows.append(AfterDecision(prob if known else None, known, logit))
        return rows

    def running(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> list[RunningDecision]:
        """taps [B, L, C] at node boundaries, think tokens used so far -> what is still needed, one per row.

        calibrated: the rows' `at_boundaries` from `budget`; by default only the plan is judged. Raises ModelError where
        `reads_boundaries` is false.
        """
        card = self.card
        if card is None or card.running is None:
            raise ModelError("this layer has no calibration at boundaries; label, train and calibrate it again")
        assert len(plans) == taps.shape[0] == len(used), "one plan and one count per row"
        flags = [True] * len(plans) if calibrated is None else calibrated
        return [
            RunningDecision(rest, int(upper), prob if flag and self._covers(plan) else None, logit)
            for (rest, upper, prob, logit), flag, plan in zip(
                self.reader.running(taps, used), flags, plans, strict=True
            )
        ]

    def reached(
        self, taps: Tensor, ends: Sequence[bool], plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool]
    ) -> list[AfterDecision | RunningDecision]:
        """`after` for the rows that ends [B] names and `running` for the others, in one read.

        calibrated: the rows' `calibrated` at end tags, `at_boundaries` at boundaries. Raises ModelError where a row
        stands at a boundary and `reads_boundaries` is false.
        """
        if all(ends):
            return list(self.after(taps, plans, used, calibrated))
        if not any(ends):
            return list(self.running(taps, plans, used, calibrated))
        card = self.card
        if card is None or card.running is None:
            raise ModelError("this layer has no calibration at boundaries; label, train and calibrate it again")
        self._check(plans, taps)
        rows: list[AfterDecision | RunningDecision] = []
        read = self.reader.reached(taps, ends, used)
        for (rest, upper, prob, logit), end, flag, plan in zip(read, ends, calibrated, plans, strict=True):
            known = flag and (card.covers(plan) if end else self._covers(plan))
            said = prob if known else None
            rows.append(AfterDecision(said, known, logit) if end else RunningDecision(rest, int(upper), said, logit))
        return rows

    def _covers(self, plan: str) -> bool:
        """Whether the card's running confidence was fitted under this plan."""
        card = self.card
        if card is None or card.running is None:
            return False
        return plan in card.running.closing_plans if self.heads.config.closing else card.covers(plan)

    def _check(self, plans: Sequence[str], taps: Tensor) -> None:
        for name in plans:
            if name not in self.plans:
                raise unknown("plan", name, self.plans)
        assert len(plans) == taps.shape[0], "one plan per row"


def combine(plan: PlanDecision, budget: BudgetDecision, sampling: Sampling | None = None) -> Decision:
    """The readings of one prompt as one Decision."""
    return Decision(
        plan=plan.plan,
        plan_probs=plan.probs,
        budget_predicted=budget.predicted,
        budget_clipped=budget.clipped,
        confidence=budget.confidence,
        calibrated=budget.calibrated,
        sampling=sampling,
    )
