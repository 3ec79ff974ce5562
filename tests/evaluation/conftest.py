"""Synthetic evaluation records with known truths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gnomon.base.seeds import numpy_generator
from gnomon.evaluation.records import EvalRecord

TASKS = {"chain": 20.0, "sort": 60.0, "rules": 120.0}


def make_records(n: int, name: str) -> list[EvalRecord]:
    """Confidence is honest by construction; the budget prediction has log-noise 0.25; `direct` is a fifth of rows."""
    g = numpy_generator("records", name)
    rows = []
    for i in range(n):
        task = list(TASKS)[i % 3]
        level = int(g.integers(1, 6))
        plan = "direct" if g.random() < 0.2 else ["steps", "verify"][int(g.integers(2))]
        chance = 1 / (1 + np.exp(-(3.5 - 1.1 * level + 1.2 * g.normal())))
        right = bool(g.random() < chance)
        after = float(np.clip(0.8 * right + 0.1, 0, 1)) if g.random() < 0.5 else float(chance)
        need = 0 if plan == "direct" else int(TASKS[task] * (0.5 + level / 5) * np.exp(0.5 * g.normal()))
        predicted = float(np.expm1(np.log1p(need) + 0.25 * g.normal())) if need else 0.0
        cap = round(np.expm1(np.log1p(predicted) + 1.2816 * 0.25))
        rows.append(
            EvalRecord(
                prompt_id=f"{name}-{i % (n - 3)}",
                task=task,
                level=level,
                plan=plan,
                correct=right and need <= cap,
                used=min(need, cap),
                stop="natural" if need <= cap else "hard",
                answered=True,
                answer_tokens=3,
                budget_predicted=predicted,
                budget_clipped=cap,
                budget_tested=cap,
                budget_effective=cap,
                conf_before=float(chance),
                conf_after=after,
                answer_logprob=float(-0.5 * g.random() - 0.5 * (not right)),
                needed=need,
                needed_correct=right,
                needed_closed=True,
            )
        )
    return rows


@pytest.fixture(scope="session")
def records_of() -> Callable[[int, str], list[EvalRecord]]:
    return make_records
