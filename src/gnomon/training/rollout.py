"""Labels by sampling the model itself: every strategy, one greedy rollout and some sampled ones (decisions.md §3)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gnomon.attempts import Attempt, Job, run
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.training.labels import LabelledProblem, LabelSet, Rollout, StrategyLabels

TEMPERATURE = 0.8


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
