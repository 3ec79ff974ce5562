"""The shipped card says "unknown" abroad and seldom at home (row U12)."""

from __future__ import annotations

import pytest

from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems

FOREIGN = (
    "hi",
    "hello",
    "What is the capital of France?",
    "Tell me a story about a dragon.",
    "Who is the president?",
    "1+1",
    "def f(x): return x",
    "My name is Bob.",
)


@pytest.fixture(scope="module")
def nano() -> Reasoner:
    return Reasoner.load("nano")


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_prompts_get_no_confidence(nano: Reasoner, text: str) -> None:
    facts = nano.decide(text)["confidence"]
    assert facts["calibrated"] is False
    assert facts["before"] is None


def test_few_of_our_own_problems_are_called_foreign(nano: Reasoner) -> None:
    items = problems("all", "test", "domain-check", 130)
    unknown = sum(not nano.decide(p.prompt)["confidence"]["calibrated"] for p in items)
    assert unknown <= 7, "2 % are promised; 7 of 130 is beyond its 99th percentile"
