"""Running estimates: offset and scale are recovered, the bound covers, and few rows promise nothing."""

from __future__ import annotations

import numpy as np
import pytest

from gnomon.base.seeds import numpy_generator
from gnomon.evaluation.running_fit import Boundaries, Closings, fit_running
from gnomon.metacognition.calibration import sigmoid


def boundaries(n: int, name: object, per_problem: int = 1) -> Boundaries:
    """log1p of the remainder is the reading plus N(0.2, 0.3); the logit is twice too bold and 1 too low."""
    g = numpy_generator("running", name)
    raw = g.normal(3.0, 0.7, n)
    z = 1.5 * g.normal(size=n)
    right = g.random(n) < sigmoid(z)
    remaining = np.expm1(raw + 0.2 + 0.3 * g.normal(size=n)).clip(0).round().astype(np.int64)
    used = g.integers(1, 40, n)
    return Boundaries(
        problem=np.arange(n) // per_problem,
        used=used,
        remaining=remaining,
        budget_raw=raw,
        conf_raw=2.0 * (z - 1.0),
        solved=right,
        correct=right,
        budget_before=np.log1p(used + remaining) + g.normal(size=n),
        conf_before=g.normal(size=n),
    )


def test_offset_and_scale_are_recovered() -> None:
    running, report = fit_running(boundaries(20000, "fit"), 0.8)
    assert running is not None and report is not None
    assert running.level == 0.95, "never below 0.95, whatever the operating clip"
    assert running.offset == pytest.approx(0.2 + 1.645 * 0.3, abs=0.06)
    assert running.temperature == pytest.approx(2.0, rel=0.1) and running.shift == pytest.approx(1.0, abs=0.1)
    assert report["coverage"] == pytest.approx(0.95, abs=0.01)
    assert report["ece"] < 0.02 and report["auroc"] > 0.8 and abs(report["auroc_before"] - 0.5) < 0.03
    assert report["error"] < report["error_before"]
    higher, _ = fit_running(boundaries(20000, "fit"), 0.99)
    assert higher is not None and higher.level == 0.99 and higher.offset > running.offset


def test_coverage_on_new_rows_is_within_binomial_bounds() -> None:
    held = []
    for k in range(60):
        running, _ = fit_running(boundaries(400, ("cal", k)), 0.9)
        fresh = boundaries(400, ("new", k))
        assert running is not None
        held.append((running.upper(fresh.budget_raw) >= fresh.remaining)[fresh.solved].mean())
    # about 200 solved rows on either side: one run has sd ≈ sqrt(2 × .0475 / 200) = .022, the mean of 60 ≈ .003
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_rows_of_one_problem_stay_in_one_fold_and_rows_without_a_reading_are_left_out() -> None:
    rows = boundaries(900, "grouped", per_problem=3)
    rows.budget_raw[:30] = np.nan
    running, report = fit_running(rows, 0.9)
    assert running is not None and report is not None and report["n"] == 870
    assert report["n_solved"] == running.n == int(rows.solved[30:].sum())


def test_few_rows_promise_nothing() -> None:
    assert fit_running(boundaries(60, "few"), 0.9) == (None, None)
    assert fit_running(boundaries(0, "none"), 0.9) == (None, None)


def closings(n: int, name: object) -> Closings:
    """Logits three times too bold and 2 too high, eight boundaries a problem."""
    g = numpy_generator("closings", name)
    z = 1.5 * g.normal(size=n)
    whole = 1.5 * g.normal(size=n)
    return Closings(
        np.arange(n) // 8, 3.0 * (z + 2.0), g.random(n) < sigmoid(z), ("steps", "verify"),
        0.5 * (whole - 1.0), g.random(n) < sigmoid(whole),
    )  # fmt: skip


def test_with_trial_answers_the_scale_is_that_of_closing_there() -> None:
    rows = boundaries(4000, "both")
    plain, _ = fit_running(rows, 0.9)
    running, report = fit_running(rows, 0.9, closings(20000, "fit"))
    assert running is not None and plain is not None and report is not None
    assert (running.offset, running.level, running.n) == (plain.offset, plain.level, plain.n), "the bound is as it was"
    assert running.temperature == pytest.approx(3.0, rel=0.1) and running.shift == pytest.approx(-2.0, abs=0.15)
    assert running.whole_temperature == pytest.approx(0.5, rel=0.1) and running.whole_shift == pytest.approx(
        1.0, abs=0.1
    )
    assert running.promise(0.0) == pytest.approx(float(sigmoid(np.array(running.whole_shift))))
    assert running.closing_plans == ("steps", "verify") and plain.closing_plans == ()
    assert report["ece"] < 0.02 and report["n_closing"] == 20000


def test_too_few_trial_answers_leave_the_confidence_unknown() -> None:
    few = Closings(
        np.arange(30), np.zeros(30), np.arange(30) % 2 == 0, ("steps",), np.zeros(30), np.arange(30) % 2 == 0
    )
    running, report = fit_running(boundaries(4000, "both"), 0.9, few)
    assert running is not None and running.closing_plans == () and report is not None and report["auroc"] is None
    assert report["missing"] == ["confidence of closing not calibrated: 7 of 20 right or wrong trial answers in a fold"]
    running, report = fit_running(boundaries(60, "few"), 0.9, few)
    assert running is None and report is not None and len(report["missing"]) == 2, "neither bound nor confidence"


@pytest.mark.parametrize("n", [0, 60])
def test_few_solved_rows_do_not_keep_the_confidence_of_closing(n: int) -> None:
    """The bound and the scale stand on rows of their own: few problems solved, many trial answers."""
    running, report = fit_running(boundaries(n, "few"), 0.9, closings(20000, "fit"))
    both, _ = fit_running(boundaries(4000, "both"), 0.9, closings(20000, "fit"))
    assert running is not None and both is not None and report is not None
    names = {"temperature", "shift", "closing_plans", "whole_temperature", "whole_shift"}
    assert running.model_dump(include=names) == both.model_dump(include=names)
    assert running.upper(np.array([-20.0, 0.0, 9.0])).min() > 9_000_000, "no cap falls to an unknown remainder"
    assert "remainder not calibrated: " in report["missing"][0] and "of 40 solved rows" in report["missing"][0]
    assert len(report["missing"]) == 1 and report["ece"] < 0.02
