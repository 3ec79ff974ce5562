"""The record of a request: JSONL round trip, refusals, the report schema; layouts and the matcher below it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base.errors import ConfigError, DataError, TagError, UnknownNameError
from gnomon.protocol.layout import Layout
from gnomon.protocol.match import Matcher
from gnomon.protocol.trace import Request, Trace, dump_traces, load_traces

TRACE = Trace(
    id="r\u2028é", sample=1, prompt_ids=(5, 6), ids=(7, 1, 10, 2, 3, 11, 4),
    roles=("forced", "forced", "sampled", "forced", "forced", "sampled", "sampled"),
    logprobs=(0.0, 0.0, -0.25, 0.0, 0.0, -0.5, -1.5), think_span=(2, 3), answer_span=(5, 6), plan="steps",
    plan_source="predicted", stop="hard", finish="end", budget_requested="predicted", budget_effective=1,
    budget_source="predicted", used=1, forced=1, think="a\u2028b", answer="c", answer_tokens=1,
    plan_probs={"steps": 0.75}, budget_predicted=1.2, budget_clipped=1, confidence_before=0.5, calibrated=True,
)  # fmt: skip


def test_jsonl_round_trip_is_exact() -> None:
    others = [replace(TRACE, id="b", budget_requested=None, plan_probs=None), replace(TRACE, budget_requested=7)]
    assert load_traces(dump_traces([TRACE, *others])) == [TRACE, *others]
    assert json.loads(TRACE.to_json())["version"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 99}, "version 99"),
        ({"roles": []}, "7 ids, 0 roles"),
        ({"think_span": [4, 99]}, "does not lie"),
        ({"stop": "bored"}, "stop 'bored'"),
        ({"colour": 1}, r"unknown \['colour'\]"),
    ],
)
def test_damaged_lines_are_named(change: dict[str, object], reason: str) -> None:
    line = json.dumps({**json.loads(TRACE.to_json()), **change})
    with pytest.raises(DataError, match=f"trace 2.*{reason}"):
        load_traces(TRACE.to_json() + "\n" + line)
    with pytest.raises(DataError, match="trace 1 is not JSON"):
        load_traces("{half")
    with pytest.raises(DataError, match="not written by gnomon"):
        load_traces('{"id": 1}')


def test_the_report_has_the_schema_of_decisions_4() -> None:
    report = TRACE.report()
    assert list(report) == ["plan", "confidence", "budget", "answer_tokens", "stop"]
    assert list(report["confidence"]) == ["before", "after", "calibrated"]
    assert list(report["budget"]) == ["requested", "predicted", "effective", "used", "forced", "source", "scope"]
    assert json.loads(json.dumps(report)) == report


def test_a_cut_answer_is_not_reported_as_natural() -> None:
    cut = replace(TRACE, stop="natural", finish="length")
    assert cut.report()["stop"] == "limit" and cut.closed_naturally and not cut.answered
    assert replace(TRACE, finish="length").report()["stop"] == "hard"


def test_derived_values() -> None:
    assert TRACE.think_ids == (10,) and TRACE.answer_ids == (11,) and TRACE.answer_logprob == -1.0
    assert TRACE.overshoot == 0 and replace(TRACE, used=4).overshoot == 3 and TRACE.answered


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"n": 0}, {"prompt_ids": ()}, {"max_answer_tokens": 0}],
)
def test_requests_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="request 'r'"):
        Request(**{"id": "r", "prompt_ids": (1,), **bad})  # type: ignore[arg-type]


def test_layouts_are_checked_and_say_what_is_never_sampled() -> None:
    good = Layout((1,), (2,), (3,), (4,), {"steps": (7,)}, (5,), 0, banned=frozenset((9,)))
    assert good.masked(True) == {0, 1, 3, 4, 7, 9} and good.masked(False) == {0, 1, 2, 3, 7, 9}
    assert replace(good, pad=5).masked(True) == {1, 3, 4, 7, 9}  # pad = eos stays possible
    assert good.overhead == 5
    with pytest.raises(TagError, match="end_think"):
        replace(good, end_think=())
    with pytest.raises(TagError, match="end-of-sequence"):
        replace(good, eos=())
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        good.plan_ids("step")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), max_size=40),
)
def test_the_matcher_agrees_with_looking_back(tags: list[tuple[int, ...]], stream: list[int]) -> None:
    rule, state = Matcher(tags), 0
    for i, symbol in enumerate(stream):
        enders = set(rule.enders[state])
        state = rule.step(state, symbol)
        seen = stream[: i + 1]
        ends = [len(t) for t in tags if tuple(seen[-len(t) :]) == t]
        assert (rule.hit[state][1] if rule.hit[state] else 0) == max(ends, default=0)  # type: ignore[index]
        assert (symbol in enders) == bool(ends)
        begun = [n for t in tags for n in range(1, len(t) + 1) if tuple(seen[-n:]) == t[:n]]
        assert rule.depth[state] == max(begun, default=0)
        if begun:
            assert any(t[max(begun) :] == rule.rest[state] for t in tags)
