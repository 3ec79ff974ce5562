"""Voting and best of n: what wins, when more is drawn, what it may cost; by hand, on a random model, and on nano."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.decoding.tiny import ATOMIC, TEXT, Tiny
from tests.own import Layer, Said
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.errors import BudgetError, ConfigError, UnknownNameError
from gnomon.decoding.engine import Engine
from gnomon.decoding.search import Vote, Votes, best_of, best_of_n, self_consistency, spread, tally, vote
from gnomon.protocol.trace import Request, Trace
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems
from gnomon.tasks.verifiers import squeeze, verify

LEAN = {2: 1.2, 4: 1.5, 5: 0.4}
PLAIN = Trace(
    id="r", sample=0, prompt_ids=(20,), ids=(1, 2, 3, 4), roles=("forced",) * 4, logprobs=(0.0,) * 4,
    think_span=(1, 1), answer_span=(3, 3), plan="steps", plan_source="requested", stop="natural", finish="end",
    budget_requested=None, budget_effective=9, budget_source="limit", used=0, forced=0,
)  # fmt: skip


def path(answer: str, sure: float | None = None, used: int = 4, sample: int = 0, cut: bool = False) -> Trace:
    tokens = len(answer)
    finish = "length" if cut else "end"
    return replace(
        PLAIN, answer=answer, answer_tokens=tokens, confidence_after=sure, used=used, sample=sample, finish=finish
    )


def text(trace: Trace) -> str:
    return trace.answer


def count(traces: Sequence[Trace]) -> Vote:
    return tally("r", traces, text)


def ids(trace: Trace) -> str:
    return " ".join(map(str, trace.answer_ids[:1]))


def parity(trace: Trace) -> str:
    return str(sum(trace.answer_ids) % 2)


def engine(lean: dict[int, float] | None = None, metacog: object = None) -> Engine:
    return Engine(Tiny("search", lean=lean or LEAN), ATOMIC, metacog, max_batch=16)  # type: ignore[arg-type]


def asked(n: int, temperature: float = 1.0, **options: object) -> list[Request]:
    out = []
    for i in range(n):
        r = seeds.rng("search-test", i)
        prompt = tuple(r.randrange(19, 32) for _ in range(r.randint(1, 20)))
        values = {"budget": 12, "max_answer_tokens": 6, "seed": i, **options}
        out.append(Request(f"q{i}", prompt, "steps", temperature=temperature, **values))  # type: ignore[arg-type]
    return out


class Sure(Layer):
    """Predicts `clipped` think tokens; how sure it is after thinking depends on the state it reads."""

    def __init__(self, clipped: int) -> None:
        self.clipped, self.known = clipped, True

    def plan(self, taps: Tensor) -> list[Said]:
        return [Said(probs={"steps": 1.0})] * len(taps)

    def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: object = None) -> list[Said]:
        return [Said(predicted=self.clipped, clipped=self.clipped)] * len(taps)

    def after(self, taps: Tensor, plans: Sequence[str], used: object, calibrated: object = None) -> list[Said]:
        sure = [math.tanh(float(t.sum())) for t in taps]
        return [Said(confidence=v if self.known else None, raw=-3 * v) for v in sure]


# -- counting -----------------------------------------------------------------------------------------------------
def test_the_majority_wins_and_shares_count_every_path() -> None:
    found = count([path("5"), path("7 "), path("7"), path("", used=1), path("7", cut=True)])
    assert (found.answer.strip(), found.share, dict(found.counts)) == ("7", 2 / 5, {"7": 2, "5": 1})
    assert list(found.counts) == ["7", "5"]
    assert found.think_tokens == 17 and found.tokens == 17 + found.answer_tokens
    assert found.trace in found.traces and len(found.traces) == 5


def test_what_counts_as_the_same_answer_is_the_callers() -> None:
    paths = [path("a  b"), path("A  b"), path("c")]
    assert count(paths).share == 1 / 3
    found = tally("r", paths, text, lambda t: squeeze(t).lower())
    assert dict(found.counts) == {"a b": 2, "c": 1} and found.answer == "a  b"


@pytest.mark.parametrize(
    ("paths", "winner"),
    [
        ([path("1", 0.4), path("2", 0.9)], "2"),
        ([path("1", 0.9), path("2", 0.1), path("2", 0.2), path("1", 0.8)], "1"),
        ([path("1", 0.5, used=9), path("2", 0.5, used=3)], "2"),
        ([path("1", None, used=9), path("2", None, used=3)], "2"),
        ([path("1", None), path("2", None)], "1"),
        ([path("1", 0.9), path("2", 0.1), path("2", 0.1)], "2"),
    ],
    ids=["confidence", "mean-confidence", "tokens", "no-layer-tokens", "first", "votes-beat-confidence"],
)
def test_ties_go_to_confidence_then_tokens_then_order(paths: list[Trace], winner: str) -> None:
    assert count(paths).answer == winner


def test_without_one_whole_answer_the_surest_path_stands_with_share_zero() -> None:
    found = count([path("12", 0.1, cut=True), path("13", 0.6, cut=True), path("")])
    assert (found.share, dict(found.counts), found.answer) == (0.0, {}, "12")  # one path has no confidence: none counts
    assert count([path("12", 0.1, cut=True), path("13", 0.6, cut=True)]).answer == "13"


def test_the_representative_is_the_surest_path_of_the_winning_answer() -> None:
    found = count([path("7", 0.5, sample=0), path("7", 0.8, sample=1), path("5", 0.99, sample=2)])
    assert found.trace.sample == 1


def test_the_order_of_paths_only_matters_in_a_full_tie() -> None:
    for i in range(60):
        r = seeds.rng("tally", i)
        paths = [path(r.choice("abc"), r.random(), r.randrange(9), k) for k in range(r.randint(1, 7))]
        want = count(paths)
        r.shuffle(paths)
        again = count(paths)
        assert (again.answer, again.share, dict(again.counts)) == (want.answer, want.share, dict(want.counts))
        assert want.counts[want.answer] == max(Counter(p.answer for p in paths).values())


# -- on the engine --------------------------------------------------------------------------------------------------
def test_the_paths_are_exactly_the_samples_of_the_engine() -> None:
    tiny, requests = engine(), asked(6)
    found = vote(tiny, requests, Votes(5, rounds=0), read=ids)
    plain = tiny.run([replace(r, n=5) for r in requests])
    assert [t.ids for v in found for t in v.traces] == [t.ids for t in plain]
    assert all(len(v.traces) == 5 and v.rounds == 1 for v in found)


def test_one_path_at_temperature_zero_is_the_greedy_answer() -> None:
    tiny, requests = engine(), asked(4, temperature=0.0)
    for request, found in zip(requests, vote(tiny, requests, Votes(1), read=ids), strict=True):
        (plain,) = tiny.run([request])
        assert found.traces == (found.trace,) and found.trace.ids == plain.ids and found.trace.stop == plain.stop
        assert found.answer == ids(plain) and found.share == float(plain.answered) and found.rounds == 1


def test_more_is_drawn_only_where_the_paths_disagree_and_only_so_often() -> None:
    tiny, requests = engine(), asked(24)
    first = vote(tiny, requests, Votes(4, rounds=0), read=parity)
    for rounds in (1, 2):
        votes = Votes(4, agree=0.7, extra=2, rounds=rounds, reflect="direct")
        found = vote(tiny, requests, votes, read=parity)
        assert min(v.rounds for v in found) == 1 < max(v.rounds for v in found)
        for a, b in zip(first, found, strict=True):
            assert b.traces[:4] == a.traces
            assert (b.rounds > 1) == (a.share < 0.7)
            assert len(b.traces) == 4 + 2 * (b.rounds - 1) and b.rounds <= 1 + rounds
            assert {t.plan for t in b.traces[4:]} <= {"direct"}
            assert b.share == (max(b.counts.values()) if b.counts else 0) / len(b.traces)
    agreed = vote(tiny, asked(6, temperature=0.02), Votes(4, agree=0.7, reflect="direct"), read=parity)
    assert all(v.rounds == 1 for v in agreed if v.share >= 0.7)
    kept = vote(tiny, requests, Votes(4, agree=0.7, reflect=None), read=parity)
    assert {t.plan for v in kept for t in v.traces} == {"steps"}


@pytest.mark.parametrize("layout", [ATOMIC, TEXT], ids=["atomic", "text"])
@pytest.mark.parametrize("budget", [None, 5, 40])
def test_the_total_is_kept_over_all_paths_and_rounds(layout: object, budget: int | None) -> None:
    tiny = Engine(Tiny("total", lean={2: -2.0, 5: -9.0}), layout, max_batch=16)  # type: ignore[arg-type]
    for total in (0, 1, 3, 4, 7, 29, 60):
        votes = Votes(4, agree=1.0, extra=3, rounds=2, reflect="direct", total=total)
        for found in vote(tiny, asked(6, budget=budget), votes, read=ids):
            caps = [t.budget_effective for t in found.traces]
            assert found.think_tokens <= total
            assert all(t.overshoot == 0 for t in found.traces)
            assert sum(caps[:4]) <= total and max(caps[:4]) - min(caps[:4]) <= 1
            assert found.rounds == 1 or total > sum(t.used for t in found.traces[:4])
            if budget is not None:
                assert max(caps) <= budget


def test_a_total_is_spent_to_the_last_token_by_paths_that_never_stop() -> None:
    tiny = Engine(Tiny("spend", lean={2: -60.0, 5: -60.0}), ATOMIC, max_batch=16)
    for total in (0, 1, 7, 30):
        found = self_consistency(tiny, asked(1, budget=None)[0], 4, read=ids, rounds=0, total=total)
        assert found.think_tokens == total


def test_a_budget_below_the_prediction_keeps_it_and_none_stays_unpredicted() -> None:
    tiny = engine({2: -60.0, 5: -60.0}, Sure(3))
    for budget, share in (("predicted", 3), (None, 5), (9, 3)):
        found = self_consistency(tiny, asked(1, budget=budget)[0], 4, read=ids, rounds=0, total=20)
        assert [t.used for t in found.traces] == [share] * 4, budget


@pytest.mark.parametrize(("total", "n"), [(0, 3), (1, 3), (7, 3), (9, 3), (100, 7)])
def test_spread_loses_no_token(total: int, n: int) -> None:
    parts = spread(total, n)
    assert sum(t * k for t, k in parts) == total and sum(k for _, k in parts) == n


def test_same_seeds_same_result_alone_and_in_company() -> None:
    requests, votes = asked(8), Votes(3, agree=0.9, reflect="direct", total=31)
    found = vote(engine(), requests, votes, read=ids)
    again = vote(engine(), requests, votes, read=ids)
    assert [v.traces for v in found] == [v.traces for v in again]
    for request, whole in zip(requests, found, strict=True):
        alone = self_consistency(engine(), request, 3, read=ids, agree=0.9, reflect="direct", total=31)
        assert [t.ids for t in alone.traces] == [t.ids for t in whole.traces] and alone.answer == whole.answer
    other = vote(engine(), [replace(r, seed=r.seed + 99) for r in requests], votes, read=ids)
    assert [v.traces for v in other] != [v.traces for v in found]


# -- best of n ------------------------------------------------------------------------------------------------------
def test_without_a_layer_the_best_path_has_the_highest_answer_logprob() -> None:
    for found in best_of(engine(), asked(8), 5, read=ids):
        assert found.scored_by == "answer log-prob" and len(found.scores) == 5
        assert list(found.scores) == [t.answer_logprob for t in found.traces]
        whole = [s for s, t in zip(found.scores, found.traces, strict=True) if t.answered] or found.scores
        assert found.scores[found.traces.index(found.trace)] == max(whole)


def test_a_layer_scores_by_confidence_calibrated_where_all_are() -> None:
    layer = Sure(12)
    found = best_of_n(engine(metacog=layer), asked(1, budget=None)[0], 6, read=ids)
    assert found.scored_by == "confidence" and found.trace.answered
    assert found.trace.confidence_after == max(s for s, t in zip(found.scores, found.traces, strict=True) if t.answered)
    layer.known = False
    raw = best_of_n(engine(metacog=layer), asked(1, budget=None)[0], 6, read=ids)
    assert raw.scored_by == "uncalibrated confidence" and all(0 < s < 1 for s in raw.scores)
    plain = best_of_n(engine(metacog=layer), asked(1, budget=None)[0], 6, "logprob", read=ids)
    assert plain.scored_by == "answer log-prob"


# -- refusals -------------------------------------------------------------------------------------------------------
def test_refusals_say_what_to_write() -> None:
    tiny, (request,) = engine(), asked(1)
    with pytest.raises(ConfigError, match="temperature above 0"):
        self_consistency(tiny, replace(request, temperature=0.0), 3, read=ids)
    with pytest.raises(ConfigError, match="at least one"):
        best_of_n(tiny, request, 0, read=ids)
    with pytest.raises(ConfigError, match="give `read`"):
        self_consistency(tiny, request, 3, reflect=None)
    with pytest.raises(UnknownNameError, match="steps"):
        self_consistency(tiny, request, 3, read=ids, reflect="stepz")
    with pytest.raises(ConfigError, match="logprob"):
        best_of_n(tiny, request, 3, "luck", read=ids)  # type: ignore[arg-type]
    for bad in ({"paths": 0}, {"extra": 0}, {"rounds": -1}, {"agree": 1.5}, {"paths": True}):
        with pytest.raises(ConfigError):
            Votes(**bad)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="negative"):
        Votes(total=-1)


# -- the shipped model ----------------------------------------------------------------------------------------------
def test_on_nano_five_votes_are_not_worse_than_one_sample() -> None:
    """60 problems of `chain`, levels 3-5, T = 0.8: the vote against the mean of its five single samples."""
    nano = Reasoner.load("nano")
    items = problems("chain", "test", "vote", 60, (3, 4, 5))
    requests = [
        nano.request(str(i), p.prompt, plan="steps", budget=None, temperature=0.8, seed=7, max_answer_tokens=48)
        for i, p in enumerate(items)
    ]
    read = lambda trace: nano.codec.decode(trace.answer_ids)  # noqa: E731
    found = vote(nano.engine(64), requests, Votes(5, rounds=0), read=read, normalise=squeeze)
    singles = [sum(verify(p, read(v.traces[k])).correct for p, v in zip(items, found, strict=True)) for k in range(5)]
    voted = sum(verify(p, v.answer).correct for p, v in zip(items, found, strict=True))
    print(json.dumps({"single": singles, "voted": voted, "n": len(items)}))
    assert voted >= sum(singles) / 5
    # Agreement says something: answers that all five share are right more often than the others.
    sure = [verify(p, v.answer).correct for p, v in zip(items, found, strict=True) if v.share == 1.0]
    rest = [verify(p, v.answer).correct for p, v in zip(items, found, strict=True) if v.share < 1.0]
    assert sure and rest and sum(sure) / len(sure) > sum(rest) / len(rest)
