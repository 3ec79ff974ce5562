"""Problems through the engine, with verdicts: what training rollouts and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gnomon.base.seeds import derive, fraction
from gnomon.protocol.tags import STRUCTURE_TOKENS, TAGS
from gnomon.protocol.trace import Request, Trace
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.tasks.verifiers import verify

MAX_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Job:
    """One problem under one plan and budget; `samples` rollouts at `temperature` (0 = greedy, one rollout)."""

    problem: Problem
    plan: str = "predicted"
    budget: int | Literal["predicted"] | None = "predicted"
    temperature: float = 0.0
    samples: int = 1
    use_prediction: bool = True
    seed: str = "attempt"
    think_prefix: tuple[int, ...] = ()  # think tokens decided before, resumed


@dataclass(frozen=True)
class Attempt:
    """One finished rollout. leaked: a tag or structure token stands in the answer."""

    problem: Problem
    trace: Trace
    answer: str
    correct: bool
    leaked: bool


def run(
    reasoner: Reasoner,
    jobs: Sequence[Job],
    *,
    max_batch: int = 64,
    record_taps: bool = False,
    sample_boundary: bool = False,
    all_boundaries: bool = False,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    on_done: Callable[[int], object] | None = None,
) -> list[list[Attempt]]:
    """Decode all jobs; one list of rollouts per job, in order. on_done(n) counts finished rollouts.

    record_taps: keep the states at "prompt", "think" and "end"; sample_boundary: also at one node boundary per rollout,
    drawn uniformly by a hash (all of them would fill the memory); all_boundaries: at all, for a few hundred jobs.
    """
    prompts: dict[str, tuple[int, ...]] = {}
    requests = []
    for number, job in enumerate(jobs):
        text = job.problem.prompt
        if text not in prompts:
            prompts[text] = tuple(reasoner.codec.encode_prompt(text))
        requests.append(
            Request(
                str(number),
                prompts[text],
                plan=job.plan,
                budget=job.budget,
                temperature=job.temperature,
                n=job.samples,
                seed=derive(job.seed, text, job.plan),
                max_answer_tokens=max_answer_tokens,
                use_prediction=job.use_prediction,
                think_prefix=job.think_prefix,
            )
        )
    found: list[list[Attempt]] = [[] for _ in jobs]

    def keep(trace: Trace) -> None:
        number = int(trace.id)
        if sample_boundary:
            trace = one_boundary(trace, requests[number].seed)
        found[number].append(judge(reasoner, jobs[number].problem, trace))
        if on_done:
            on_done(1)

    reasoner.engine(max_batch).run(
        requests, record_taps=record_taps, record_boundaries=sample_boundary or all_boundaries, on_trace=keep
    )
    return [sorted(rollouts, key=lambda a: a.trace.sample) for rollouts in found]


def one_boundary(trace: Trace, seed: int) -> Trace:
    """The trace with at most one boundary of its think block; which one depends on seed and sample alone."""
    inside = [b for b in trace.boundaries or () if b[0] <= trace.used]  # a line end may belong to the closing tag
    if not inside:
        return replace(trace, boundaries=None)
    return replace(trace, boundaries=[inside[int(fraction("boundary", seed, trace.sample) * len(inside))]])


def judge(reasoner: Reasoner, problem: Problem, trace: Trace) -> Attempt:
    """The answer of a trace and its verdict; a cut answer is judged as it stands."""
    answer = reasoner.codec.decode(trace.answer_ids)
    leaked = any(tag in answer for tag in (*TAGS, *STRUCTURE_TOKENS))
    return Attempt(problem, trace, answer, trace.answer_tokens > 0 and verify(problem, answer).correct, leaked)


def prompt_logprobs(reasoner: Reasoner, problems: Sequence[Problem], most: int = 2**25) -> list[float]:
    """Mean log-prob of each prompt's tokens under the base: the perplexity baseline of confidence-before.

    most: logits held at a time (a foreign base has a large vocabulary and long prompts).
    """
    encoded = [reasoner.codec.encode_prompt(p.prompt) for p in problems]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    values = [0.0] * len(encoded)
    longest = max((len(ids) for ids in encoded), default=1)
    chunk = min(32, max(1, most // (longest * reasoner.backbone.vocab_size)))
    for start in range(0, len(order), chunk):
        rows = [encoded[i] for i in order[start : start + chunk]]
        cache = reasoner.backbone.new_cache(len(rows), max(map(len, rows)))
        out = reasoner.backbone.extend(cache, rows, logits="all")
        assert out.logits is not None
        for i, ids, logits in zip(order[start:], rows, out.logits.split([len(ids) for ids in rows]), strict=False):
            following = torch.tensor(ids[1:], device=logits.device)
            scores = logits[:-1].gather(-1, following[:, None])[:, 0] - logits[:-1].logsumexp(-1)
            values[i] = float(scores.mean()) if len(ids) > 1 else 0.0
    return values
