"""Self-consistency measured: the majority of several sampled paths per problem, and what it costs (row D6)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from gnomon.attempts import MAX_ANSWER_TOKENS
from gnomon.base.seeds import derive
from gnomon.base.telemetry import Progress
from gnomon.decoding.search import Votes, vote
from gnomon.evaluation.metrics import wilson
from gnomon.evaluation.runner import plan_of
from gnomon.protocol.trace import Request
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.tasks.verifiers import verify


def evaluate_votes(
    reasoner: Reasoner,
    items: Sequence[Problem],
    votes: Votes,
    plan: str = "predicted",
    budget: int | Literal["predicted"] | None = "predicted",
    temperature: float = 0.8,
    *,
    seed: str = "votes",
    max_batch: int = 64,
    quiet: bool = False,
) -> dict[str, Any]:
    """Accuracy of the vote beside that of a single path, with tokens of all paths.

    think_tokens_mean: of all paths of a problem. share_mean: paths that gave the winning answer. reflected: problems
    whose paths disagreed and drew more.
    """
    requests = [
        Request(
            str(i),
            tuple(reasoner.codec.encode_prompt(p.prompt)),
            plan=plan_of(reasoner, plan, p.task),
            budget=budget,
            temperature=temperature,
            seed=derive(seed, p.prompt),
            max_answer_tokens=MAX_ANSWER_TOKENS,
        )
        for i, p in enumerate(items)
    ]
    with Progress("votes", len(items) * votes.paths, quiet=quiet) as bar:
        found = vote(
            reasoner.engine(max_batch),
            requests,
            votes,
            read=lambda trace: reasoner.codec.decode(trace.answer_ids),
            on_trace=lambda _: bar.advance(1),
        )
    right = [verify(p, v.answer).correct for p, v in zip(items, found, strict=True)]
    first = [
        verify(p, reasoner.codec.decode(v.traces[0].answer_ids)).correct for p, v in zip(items, found, strict=True)
    ]
    n = len(items)
    return {
        "n": n,
        "votes": votes.paths,
        "accuracy": sum(right) / n,
        "accuracy_ci": list(wilson(sum(right), n)),
        "single_path_accuracy": sum(first) / n,
        "single_path_accuracy_ci": list(wilson(sum(first), n)),
        "share_mean": statistics.fmean(v.share for v in found),
        "reflected": sum(v.rounds > 1 for v in found) / n,
        "think_tokens_mean": statistics.fmean(v.think_tokens for v in found),
        "answer_tokens_mean": statistics.fmean(v.answer_tokens for v in found),
        "by_task": {name: _share(right, items, name) for name in dict.fromkeys(p.task for p in items)},
    }


def _share(right: Sequence[bool], items: Sequence[Problem], task: str) -> dict[str, float]:
    mine = [r for r, p in zip(right, items, strict=True) if p.task == task]
    return {"accuracy": statistics.fmean(mine), "n": len(mine)}
