"""Pass rates of the sampler grid, the labels of the decoding policy (row D4, decisions.md §3).

P problems · K strategies · G entries of metacognition.policy.GRID
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gnomon.attempts import Job, run
from gnomon.metacognition.decide import AfterDecision, BudgetDecision, PlanDecision, RunningDecision
from gnomon.metacognition.policy import GRID, IDENTITY, Sampling
from gnomon.model.steering import Steering
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.training.labels import LabelSet


@dataclass(frozen=True)
class _Always:
    """A layer that predicts nothing and always samples thoughts in one way."""

    entry: Sampling | None
    steering: Steering | None = None
    reads_boundaries: bool = False
    modulates: bool = True

    def plan(self, taps: Tensor) -> list[PlanDecision]:
        return [PlanDecision("", {})] * len(taps)

    def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: Any = None) -> list[BudgetDecision]:
        return [BudgetDecision(0.0, 0, None, False, 0.0)] * len(plans)

    def policy(self, taps: Tensor, plans: Sequence[str]) -> list[Sampling | None]:
        return [self.entry] * len(plans)

    def reached(self, taps: Tensor, ends: Sequence[bool], *_: Any) -> list[AfterDecision | RunningDecision]:
        return [AfterDecision(None, False, 0.0)] * len(ends)


def policy_rates(
    reasoner: Reasoner,
    problems: Sequence[Problem],
    labels: LabelSet,
    samples: int,
    *,
    cap: int | None = None,
    seed: str = "policy",
    max_batch: int = 64,
    on_done: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Share right [P, K, G] of every problem at its plan label, NaN elsewhere; answers are greedy.

    problems: those of the labels, in their order. samples: rollouts of every entry but identity, which is greedy and
    gives one. The layer's own steering does not act: policies are measured on the base.
    """
    plans = labels.plan_labels()
    rates = np.full((len(problems), len(labels.strategies), len(GRID)), np.nan)
    at = [(i, plan) for i, plan in enumerate(plans) if plan is not None]
    for g, entry in enumerate(GRID):
        n = 1 if g == IDENTITY else samples
        fixed: Any = _Always(entry)
        bare = replace(reasoner, decider=fixed, modulate=True, rules=None)
        jobs = [Job(problems[i], plan, cap, samples=n, use_prediction=False, seed=f"{seed}/{g}") for i, plan in at]
        for (i, plan), group in zip(at, run(bare, jobs, max_batch=max_batch, on_done=on_done), strict=True):
            rates[i, labels.strategies.index(plan), g] = sum(a.correct for a in group) / len(group)
    return rates
