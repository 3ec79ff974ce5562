"""evaluate() and sweep(): draw held-out problems, decode them, hand plain records to the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gnomon.attempts import Attempt, Job, prompt_logprobs, run
from gnomon.base.errors import ConfigError, ModelError, unknown
from gnomon.base.telemetry import Progress
from gnomon.evaluation import metrics
from gnomon.evaluation.baselines import best_strategy, constant_policies
from gnomon.evaluation.records import EvalRecord, summarise
from gnomon.evaluation.sweep import BUDGETS, Outcome, Sweep, run_sweep
from gnomon.protocol.tags import STRATEGIES
from gnomon.protocol.trace import Trace
from gnomon.reasoner import Reasoner
from gnomon.tasks.demonstrations import with_shots
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import LEVELS, problems
from gnomon.tasks.splits import canonical

Budget = int | None | Literal["predicted"]


@dataclass(frozen=True)
class Evaluated:
    """The summary (`evaluate --json`) and the records behind it."""

    summary: dict[str, Any]
    records: list[EvalRecord]
    calibration: list[EvalRecord]
    attempts: list[Attempt]


def plan_of(reasoner: Reasoner, plan: str, task: str) -> str:
    """The plan of a request: a strategy or "predicted" as given, "best" looked up per family."""
    if plan == "best":
        if task in reasoner.best_plan:
            return reasoner.best_plan[task]
        raise ModelError(
            f"{reasoner.name} stores no best plan for {task!r} (it is chosen on val when heads are trained); "
            f"write --plan {' | '.join(reasoner.codec.strategies)}"
        )
    options = (*reasoner.codec.strategies, "predicted", "best")
    if plan not in options:
        raise unknown("plan", plan, options)
    if plan == "predicted" and reasoner.decider is None:
        raise ModelError(
            f"{reasoner.name} has no metacognitive layer, so no plan can be predicted; train one with "
            f"`gnomon train metacog --base {reasoner.name}` or write --plan steps --budget none"
        )
    return plan


def decode_records(
    reasoner: Reasoner,
    items: Sequence[Problem],
    plan: str,
    budget: Budget,
    *,
    uncapped_pass: bool = True,
    cap: int | None = None,
    seed: str = "evaluate",
    max_batch: int = 64,
    on_done: Callable[[int], object] | None = None,
) -> tuple[list[EvalRecord], list[Attempt]]:
    """Greedy decode at the given plan and budget, and what the same problems and plans need without a cap.

    A row that closed by itself under its cap is its own uncapped pass (greedy decoding is deterministic), so only cut
    rows are decoded further, from where they were cut. cap: the uncapped pass still stops here (None = the context).
    """
    if budget == "predicted" and reasoner.decider is None:
        raise ModelError(
            f"{reasoner.name} has no metacognitive layer, so no budget can be predicted; write --budget none"
        )
    jobs = [Job(p, plan_of(reasoner, plan, p.task), budget, seed=seed) for p in items]
    if budget is not None and budget != "predicted":
        jobs = [Job(j.problem, j.plan, budget, use_prediction=False, seed=seed) for j in jobs]
    attempts = [found[0] for found in run(reasoner, jobs, max_batch=max_batch, on_done=on_done)]
    needed: dict[int, Attempt] = {i: a for i, a in enumerate(attempts) if a.trace.stop == "natural"}
    if uncapped_pass:
        cut = [i for i in range(len(attempts)) if i not in needed]
        most = reasoner.max_think if cap is None else cap
        again = [_resumed(items[i], attempts[i].trace, cap, most, seed) for i in cut]
        bare = reasoner.unpredicted()
        for i, found in zip(cut, run(bare, again, max_batch=max_batch), strict=True):
            needed[i] = found[0]
    prompts = prompt_logprobs(reasoner, items)
    return [_record(reasoner, a, needed.get(i), prompts[i]) for i, a in enumerate(attempts)], attempts


def _resumed(problem: Problem, trace: Trace, budget: int | None, keep: int | None, seed: str) -> Job:
    """The same problem and plan at another budget, from the first `keep` think tokens (None = all) of `trace`.

    What was forced at a cut (the transition of foreign bases) stands behind them and is left out.
    """
    most = trace.used if keep is None else min(keep, trace.used)
    return Job(problem, trace.plan, budget, use_prediction=False, seed=seed, think_prefix=trace.think_ids[:most])


def _record(reasoner: Reasoner, attempt: Attempt, need: Attempt | None, prompt_logprob: float) -> EvalRecord:
    trace, problem = attempt.trace, attempt.problem
    card = reasoner.decider.card if reasoner.decider else None
    tested = None
    if card is not None and trace.budget_predicted is not None:
        tested = int(card.clip_budget(np.array([math.log1p(trace.budget_predicted)]), "tested")[0])
    return EvalRecord(
        prompt_id=canonical(problem.prompt),
        task=problem.task,
        level=problem.level,
        plan=trace.plan,
        correct=attempt.correct,
        used=trace.used,
        stop=trace.stop,
        answered=trace.answered,
        leaked=attempt.leaked,
        forced=trace.forced,
        answer_tokens=trace.answer_tokens,
        budget_predicted=trace.budget_predicted,
        budget_clipped=trace.budget_clipped,
        budget_tested=tested,
        budget_effective=trace.budget_effective,
        conf_before=trace.confidence_before,
        conf_after=trace.confidence_after,
        answer_logprob=math.nan if trace.answer_logprob is None else trace.answer_logprob,
        prompt_logprob=prompt_logprob,
        needed=None if need is None else need.trace.used,
        needed_correct=need is not None and need.correct,
        needed_closed=need is not None and need.trace.closed_naturally,
    )


def evaluate(
    reasoner: Reasoner,
    tasks: str,
    split: str = "test",
    stream: str = "evaluate",
    n: int = 200,
    plan: str = "predicted",
    budget: Budget = "predicted",
    levels: Sequence[int] = LEVELS,
    *,
    baseline_n: int = 600,
    shots: int | None = None,
    cap: int | None = None,
    max_batch: int = 64,
    quiet: bool = False,
) -> Evaluated:
    """Quality, budgets and confidence on `n` problems; baselines are fitted on `baseline_n` calibration problems.

    cap: think tokens at which the uncapped pass stops all the same (None = the context). shots: worked examples shown
    in every prompt (None = as the family draws it).
    """
    items = problems(tasks, split, stream, n, levels)
    if shots is not None:
        items = [with_shots(p, shots) for p in items]
    for item in items[:1]:
        plan_of(reasoner, plan, item.task)
    fit_n = min(baseline_n, n) if reasoner.decider is not None and plan == "predicted" else 0
    calibration: list[EvalRecord] = []
    if fit_n:
        held = problems(tasks, "calibration", f"{stream}/baselines", fit_n, levels)
        if shots is not None:
            held = [with_shots(p, shots) for p in held]
        with Progress("fit baselines", fit_n, quiet=quiet) as bar:
            calibration, _ = decode_records(
                reasoner, held, plan, budget, cap=cap, max_batch=max_batch, on_done=bar.advance
            )
    with Progress("evaluate", n, quiet=quiet) as bar:
        records, attempts = decode_records(
            reasoner, items, plan, budget, cap=cap, max_batch=max_batch, on_done=bar.advance
        )
    return Evaluated(summarise(records, calibration or None), records, calibration, attempts)


def sweep_problems(
    reasoner: Reasoner,
    items: Sequence[Problem],
    *,
    strategies: Sequence[str] | None = None,
    budgets: Sequence[int | None] = BUDGETS,
    cap: int | None = None,
    max_batch: int = 64,
    title: str = "sweep",
    quiet: bool = False,
) -> Sweep:
    """All budgets × strategies, greedy, from one uncapped pass.

    A row that closed within B is not decoded again for B; of a longer one the first B think tokens are kept and only
    the answer is decoded. Under soft rules, which may read budget and layer, every row that thinks is decoded from the
    start at every budget.
    """
    ruled = reasoner.rules is not None
    reasoner = replace(reasoner, running=False, modulate=False) if ruled else reasoner.unpredicted()
    # A layer that acts, or is asked by rules, may know fewer plans than its base can write.
    known = reasoner.codec.strategies if reasoner.decider is None else reasoner.decider.plans
    names = tuple(strategies or known)
    cells = [(s, i) for i in range(len(items)) for s in names]  # neighbours share a prompt, so they share its prefill
    with Progress(f"{title}: uncapped", len(cells), quiet=quiet) as bar:
        jobs = [Job(items[i], s, cap, use_prediction=False, seed="sweep") for s, i in cells]
        found = run(reasoner, jobs, max_batch=max_batch, on_done=bar.advance)
    traces = {cell: group[0].trace for cell, group in zip(cells, found, strict=True)}
    full = {cell: _outcome(group[0]) for cell, group in zip(cells, found, strict=True)}
    over = [(s, i, b) for s, i in cells for b in budgets if b is not None and full[s, i].used > (0 if ruled else b)]
    with Progress(f"{title}: cut", len(over), quiet=quiet) as bar:
        jobs = [_resumed(items[i], traces[s, i], b, 0 if ruled else b, "sweep") for s, i, b in over]
        found = run(reasoner, jobs, max_batch=max_batch, on_done=bar.advance)
    cut = {cell: _outcome(group[0]) for cell, group in zip(over, found, strict=True)}
    # A rule only closes: a greedy thought of the same length is the same thought, cut by nothing.
    cut = {(s, i, b): full[s, i] if o.used == full[s, i].used else o for (s, i, b), o in cut.items()}
    return run_sweep(
        names,
        lambda s: [full[s, i] for i in range(len(items))],
        lambda s, rows, b: [cut[s, i, b] for i in rows],
        budgets,
        shortens=ruled,
    )


def _outcome(attempt: Attempt) -> Outcome:
    trace = attempt.trace
    return Outcome(attempt.correct, trace.used, trace.closed_naturally, trace.answered)


def sweep(
    reasoner: Reasoner,
    tasks: str,
    split: str = "test",
    stream: str = "sweep",
    n: int = 200,
    levels: Sequence[int] = LEVELS,
    *,
    val_n: int = 200,
    strategies: Sequence[str] | None = None,
    cap: int | None = None,
    max_batch: int = 64,
    quiet: bool = False,
) -> Sweep:
    """The quality-versus-budget sweep with its policies: predicted, best fixed strategy, best per-family constant.

    The constants are chosen on `val_n` problems of the val split, never on `split`.
    """
    if n < 1 or val_n < 1:
        raise ConfigError(f"n = {n} and val_n = {val_n} must be at least 1")
    items = problems(tasks, split, stream, n, levels)
    held = problems(tasks, "val", f"{stream}/val", val_n, levels)
    shape: dict[str, Any] = {"strategies": strategies, "cap": cap, "max_batch": max_batch, "quiet": quiet}
    val = sweep_problems(reasoner, held, title="sweep on val", **shape)
    test = sweep_problems(reasoner, items, **shape)
    test.extra.update(policies(val, held, test, items))
    if reasoner.decider is not None:
        records, _ = decode_records(reasoner, items, "predicted", "predicted", uncapped_pass=False, max_batch=max_batch)
        test.extra["predicted"] = against(records, test, items, val, held)
    return test


def policies(val: Sweep, held: Sequence[Problem], test: Sweep, items: Sequence[Problem]) -> dict[str, dict[str, Any]]:
    """Fixed policies chosen on val and applied to test: best fixed strategy and best (strategy, budget) per family."""
    families, mine = [p.task for p in held], [p.task for p in items]
    out: dict[str, dict[str, Any]] = {}
    best, correct, used = _best_fixed(val, held, test, items)
    out["best_fixed"] = _policy(correct, used) | {"choice": best}
    for name in test.strategies:
        k = test.strategies.index(name)
        out[f"fixed:{name}"] = _policy(test.correct[:, k, -1], test.used[:, k, -1])
    found = []
    for policy in constant_policies(families, val.correct, val.used):
        correct, used = policy.apply(mine, test.correct, test.used)
        found.append({"tokens": float(used.mean()), "accuracy": float(correct.mean()), "val_tokens": policy.tokens})
    out["constants"] = {"points": found}
    return out


def against(
    records: Sequence[EvalRecord], test: Sweep, items: Sequence[Problem], val: Sweep, held: Sequence[Problem]
) -> dict[str, Any]:
    """Predicted plan and budget against the best fixed strategy per family, paired on the same problems.

    loss: accuracy of best fixed minus predicted, with a paired bootstrap interval; token_share: predicted over best
    fixed think tokens; constant_tokens: what the best per-family constants chosen on val need for equal accuracy, None
    where none reaches it.
    """
    correct = np.array([r.correct for r in records])
    used = np.array([r.used for r in records])
    _, base, base_used = _best_fixed(val, held, test, items)
    loss, (low, high) = metrics.paired_difference(base, correct)
    mine = _policy(correct, used)
    points = test.extra.get("constants", {}).get("points", [])
    return mine | {
        "constant_tokens": min((p["tokens"] for p in points if p["accuracy"] >= mine["accuracy"]), default=None),
        "loss": loss,
        "loss_ci": [low, high],
        "token_share": float(used.mean() / max(base_used.mean(), 1e-9)),
        "plan_share": {s: float(np.mean([r.plan == s for r in records])) for s in (*STRATEGIES,)},
    }


def _best_fixed(
    val: Sweep, held: Sequence[Problem], test: Sweep, items: Sequence[Problem]
) -> tuple[dict[str, str], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(family -> strategy chosen on val, correct [N], used [N] of that choice on test), unlimited."""
    best = best_strategy([p.task for p in held], val.correct[:, :, -1], val.used[:, :, -1], val.strategies)
    pick = np.array([val.strategies.index(best.get(p.task, val.strategies[0])) for p in items])
    rows = np.arange(len(items))
    return best, test.correct[rows, pick, -1], test.used[rows, pick, -1]


def _policy(correct: np.ndarray[Any, Any], used: np.ndarray[Any, Any]) -> dict[str, Any]:
    right = int(correct.sum())
    return {
        "accuracy": right / len(correct),
        "accuracy_ci": list(metrics.wilson(right, len(correct))),
        "tokens": float(used.mean()),
    }
