"""Problems through the engine: order, verdicts, leaks, prompt log-probs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import own

from gnomon.attempts import Attempt, Job, judge, prompt_logprobs, run
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return Reasoner.load(own.save(own.taught(steps=60), tmp_path_factory.mktemp("base")))


def test_jobs_come_back_in_order_with_their_samples(reasoner: Reasoner) -> None:
    items = problems("boolean", "test", "attempts", 5, (1, 2))
    jobs = [Job(p, s, 6, use_prediction=False) for p in items for s in ("steps", "direct")]
    jobs.append(Job(items[0], "steps", 6, temperature=1.0, samples=3, use_prediction=False))
    seen: list[int] = []
    found = run(reasoner, jobs, max_batch=4, on_done=seen.append)
    assert sum(seen) == len(jobs) + 2 == sum(map(len, found))
    for job, group in zip(jobs, found, strict=True):
        assert [a.trace.sample for a in group] == list(range(job.samples))
        for a in group:
            assert a.problem is job.problem and a.trace.plan == job.plan and a.trace.used <= 6
            assert a.trace.prompt_ids == tuple(reasoner.codec.encode_prompt(job.problem.prompt))
            assert a.answer == reasoner.codec.decode(a.trace.answer_ids)
    again = run(reasoner, jobs, max_batch=64)
    assert [[a.trace.ids for a in g] for g in again] == [[a.trace.ids for a in g] for g in found]


def test_verdicts_are_those_of_the_verifier(reasoner: Reasoner) -> None:
    items = problems("boolean", "test", "verdicts", 30, (1,))
    found = [g[0] for g in run(reasoner, [Job(p, "direct", None, use_prediction=False) for p in items])]
    right = [a.correct for a in found]
    assert right == [a.answer.lower() == a.problem.answer.lower() for a in found] and 0 < sum(right) < len(right)


def test_leaked_tags_are_seen_and_an_empty_answer_is_wrong(reasoner: Reasoner) -> None:
    tok = own.tokenizer()
    (problem,) = problems("boolean", "test", "leak", 1, (1,))
    ((clean,),) = run(reasoner, [Job(problem, "direct", 0, use_prediction=False)])
    start, end = clean.trace.answer_span

    def with_answer(*ids: int) -> Attempt:
        trace = replace(
            clean.trace,
            ids=(*clean.trace.ids[:start], *ids),
            answer_span=(start, start + len(ids)),
            answer_tokens=len(ids),
        )
        return judge(reasoner, problem, trace)

    right = tok.encode(" " + problem.answer)
    assert with_answer(*right).correct and not with_answer(*right).leaked
    assert with_answer(*right, tok.think).leaked and with_answer(tok.kinds["S"], *right).leaked
    assert not with_answer().correct
    assert not clean.leaked and end > start


def test_prompt_logprobs_equal_a_plain_forward_pass(reasoner: Reasoner) -> None:
    items = problems("boolean,chain,sort", "test", "logprobs", 9)
    net = reasoner.backbone.module  # type: ignore[attr-defined]
    want = []
    for problem in items:
        ids = torch.tensor([reasoner.codec.encode_prompt(problem.prompt)])
        with torch.no_grad():
            logp = net(ids).logits[0, :-1].log_softmax(-1)
        want.append(float(logp.gather(-1, ids[0, 1:, None]).mean()))
    assert np.allclose(prompt_logprobs(reasoner, items), want, atol=1e-4)
    assert np.allclose(prompt_logprobs(reasoner, items, most=1), want, atol=1e-4)  # one row at a time
