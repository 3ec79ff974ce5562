"""Labels by sampling the model itself: every strategy, one greedy rollout and some sampled ones (decisions.md §3).

And trial answers: the same thoughts, closed early on purpose.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from gnomon.attempts import Attempt, Job, run
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.training.labels import FACTS_FILE, LabelledProblem, LabelSet, Rollout, StrategyLabels
from gnomon.training.trials import Trials

TEMPERATURE = 0.8
_TRIAL_CHUNK: Final = 256  # problems whose thoughts keep all boundaries at a time


def jobs_for(
    problems: Sequence[Problem], strategies: Sequence[str], samples: int, cap: int | None, seed: str
) -> list[Job]:
    """Per problem and strategy a greedy job and, with samples > 0, one of `samples` rollouts at T = 0.8.

    cap: think tokens at most, None = the context (a rollout that reaches it counts as censored).
    """
    jobs = []
    for problem in problems:
        for strategy in strategies:
            base = Job(problem, strategy, cap, use_prediction=False, seed=seed)
            jobs.append(base)
            if samples:
                jobs.append(replace(base, temperature=TEMPERATURE, samples=samples))
    return jobs


def label(
    reasoner: Reasoner,
    problems: Sequence[Problem],
    *,
    strategies: Sequence[str] | None = None,
    samples: int = 3,
    cap: int | None = None,
    seed: str = "labels",
    max_batch: int = 64,
    on_done: Callable[[int], object] | None = None,
    meta: dict[str, Any] | None = None,
) -> LabelSet:
    """Roll out all strategies on all problems and keep outcomes with the states they belong to.

    Every rollout keeps the state at one of its node boundaries, where it has any.
    """
    names = tuple(strategies or reasoner.codec.strategies)
    jobs = jobs_for(problems, names, samples, cap, seed)
    found = run(
        reasoner.unpredicted(), jobs, max_batch=max_batch, record_taps=True, sample_boundary=True, on_done=on_done
    )
    per_job = 2 if samples else 1
    labelled = []
    for i, problem in enumerate(problems):
        cells = {}
        taps_prompt = None
        for k, name in enumerate(names):
            start = (i * len(names) + k) * per_job
            rollouts = [a for group in found[start : start + per_job] for a in group]
            taps = rollouts[0].trace.taps
            assert taps is not None, "the engine was asked to record taps"
            taps_prompt = taps["prompt"] if taps_prompt is None else taps_prompt
            cells[name] = StrategyLabels(taps["think"], tuple(_rollout(a, n == 0) for n, a in enumerate(rollouts)))
        assert taps_prompt is not None
        labelled.append(LabelledProblem(problem_id(problem), problem.task, problem.level, taps_prompt, cells))
    return LabelSet(names, tuple(labelled), {"base": reasoner.base, "samples": samples, "seed": seed, **(meta or {})})


class TrialAnswer(NamedTuple):
    """What answering at one place gives: right, mean log-prob per answer token (-inf without one), answer tokens."""

    correct: bool
    logprob: float
    tokens: int


def trial_answers(
    reasoner: Reasoner,
    cuts: Sequence[tuple[Problem, str, tuple[int, ...]]],
    max_batch: int = 64,
    on_done: Callable[[int], object] | None = None,
) -> list[TrialAnswer]:
    """(problem, strategy, think tokens kept) -> the greedy answer where the thought is closed behind them."""
    jobs = [Job(p, plan, len(ids), use_prediction=False, seed="trials", think_prefix=ids) for p, plan, ids in cuts]
    found = [group[0] for group in run(reasoner, jobs, max_batch=max_batch, on_done=on_done)]
    logprobs = [a.trace.answer_logprob for a in found]
    return [
        TrialAnswer(a.correct, -math.inf if p is None else p, a.trace.answer_tokens)
        for a, p in zip(found, logprobs, strict=True)
    ]


def label_trials(
    reasoner: Reasoner,
    problems: Sequence[Problem],
    *,
    strategies: Sequence[str] | None = None,
    cap: int | None = None,
    max_batch: int = 64,
    on_done: Callable[[int], object] | None = None,
    meta: dict[str, Any] | None = None,
    keep: Path | None = None,
) -> Trials:
    """Greedy thoughts of all strategies, and an answer at every node boundary inside them.

    on_done(n): thoughts that have all their answers. keep: a folder of this draw alone, where every finished part is
    kept, so that a stopped one goes on with those it has. Strategies that do not think have no rows. Raises DataError
    where no thought has any.
    """
    names = tuple(strategies or reasoner.codec.strategies)
    bare = reasoner.unpredicted()
    told = {"base": reasoner.base, **(meta or {})}
    parts = []
    for start in range(0, len(problems), _TRIAL_CHUNK):
        items = problems[start : start + _TRIAL_CHUNK]
        place = None if keep is None else keep / f"{start}-{start + len(items)}"
        if place is not None and (place / FACTS_FILE).is_file():
            parts.append(Trials.load(place))
        else:
            parts.append(_trial_part(bare, items, names, cap, max_batch, told))
            if place is not None:
                parts[-1].save(place)
        if on_done is not None:
            on_done(len(items) * len(names))
    return Trials.joined(parts)


def _trial_part(
    bare: Reasoner,
    problems: Sequence[Problem],
    names: tuple[str, ...],
    cap: int | None,
    max_batch: int,
    meta: dict[str, Any],
) -> Trials:
    """The trial answers of a few problems; problem counts from the first of them."""
    rows: list[tuple[Any, ...]] = []
    places = [(i, k) for i in range(len(problems)) for k in range(len(names))]
    jobs = [Job(problems[i], names[k], cap, use_prediction=False, seed="trials") for i, k in places]
    thoughts = [group[0] for group in run(bare, jobs, max_batch=max_batch, all_boundaries=True)]
    inside = [[b for b in a.trace.boundaries or () if b[0] < a.trace.used] for a in thoughts]
    cuts = [
        (problems[i], names[k], a.trace.think_ids[:used])
        for (i, k), a, found in zip(places, thoughts, inside, strict=True)
        for used, _ in found
    ]
    answers = iter(trial_answers(bare, cuts, max_batch))
    for (i, k), a, found in zip(places, thoughts, inside, strict=True):
        rows += [(taps, used, next(answers).correct, i, k, a.trace.used, a.correct) for used, taps in found]
    taps, *facts = zip(*rows, strict=True) if rows else ((),) * 7
    used, right, problem, plan, total, final = (np.asarray(column, dtype=np.int64) for column in facts)
    return Trials(
        names, tuple(map(problem_id, problems)), np.asarray(taps, dtype=np.float32), used, right.astype(np.bool_),
        problem, plan, total, final.astype(np.bool_), meta,
    )  # fmt: skip


def problem_id(problem: Problem) -> str:
    """A short hash of the problem's text."""
    return hashlib.blake2b(f"{problem.task}\x1f{problem.prompt}".encode(), digest_size=8).hexdigest()


def _rollout(attempt: Attempt, greedy: bool) -> Rollout:
    trace = attempt.trace
    assert trace.taps is not None
    logprob = trace.answer_logprob
    boundary = trace.boundaries[0] if trace.boundaries else None
    return Rollout(
        correct=attempt.correct,
        used=trace.used,
        answer_tokens=trace.answer_tokens,
        answer_logprob=math.nan if logprob is None else logprob,
        closed=trace.closed_naturally,
        taps_end=trace.taps["end"],
        greedy=greedy,
        boundary=boundary,
    )
