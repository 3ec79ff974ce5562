"""Verifiers: strict, total, bounded; the lenient one is a separate name."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base.errors import UnknownNameError
from gnomon.tasks.problem import Problem
from gnomon.tasks.verifiers import FILE_VERIFIERS, MAX_ANSWER_CHARS, Verdict, verify, verify_lenient

GOLD = {"exact": "green box", "integer": "-42", "numeric": "3/4", "list": "3, 1, 2", "literal": "[1, 'a', (2.0, True)]"}


def make(verifier: str, answer: str | None = None) -> Problem:
    return Problem("t", 1, "p", GOLD[verifier] if answer is None else answer, verifier)


@pytest.mark.parametrize(
    ("verifier", "text"),
    [
        ("exact", "green box"),
        ("exact", "  green \n box "),
        ("integer", "-42"),
        ("integer", " -42\n"),
        ("numeric", "0.75"),
        ("numeric", "6/8"),
        ("numeric", "0.750"),
        ("list", "3,1,2"),
        ("list", "3 , 1,  2"),
        ("literal", "[1,'a',(2.0,True)]"),
        ("literal", ' [ 1, "a", (2., True) ] '),
    ],
)
def test_right_answers(verifier: str, text: str) -> None:
    assert verify(make(verifier), text) == Verdict(True, "ok", verify(make(verifier), text).extracted)


@pytest.mark.parametrize(
    ("verifier", "text", "reason"),
    [
        ("exact", "Green box", "wrong"),
        ("exact", "green box.", "wrong"),
        ("integer", "the answer is -42", "format"),
        ("integer", "-42.0", "format"),
        ("integer", "-042", "format"),
        ("integer", "-42, -41", "format"),
        ("integer", "-\u0664\u0662", "format"),
        ("integer", "−42", "format"),
        ("integer", "42", "wrong"),
        ("integer", "9" * 1500, "format"),
        ("numeric", "3/4 or 1", "format"),
        ("numeric", "1/0", "format"),
        ("numeric", "7.5e-1", "format"),
        ("numeric", "nan", "format"),
        ("numeric", "0.7500000001", "wrong"),
        ("list", "3 1 2", "wrong"),
        ("list", "3,,1,2", "format"),
        ("list", "3,1,2,", "format"),
        ("list", "1,2,3", "wrong"),
        ("literal", "[True, 'a', (2.0, True)]", "wrong"),
        ("literal", "[1, 'a', (2, True)]", "wrong"),
        ("literal", "[1, 'a', [2.0, True]]", "wrong"),
        ("literal", "__import__('os')", "format"),
        ("literal", "[1, 'a', (2.0, True)", "format"),
        ("literal", "[" * 60 + "]" * 60, "format"),
        ("literal", "0) or (True", "format"),
        ("literal", "-" * 3000 + "1", "format"),
    ],
)
def test_wrong_answers(verifier: str, text: str, reason: str) -> None:
    found = verify(make(verifier), text)
    assert (found.correct, found.reason) == (False, reason)


@pytest.mark.parametrize("verifier", FILE_VERIFIERS)
def test_empty_and_oversized_are_named(verifier: str) -> None:
    assert verify(make(verifier), " \n").reason == "empty"
    assert verify(make(verifier), "7" * (MAX_ANSWER_CHARS + 1)).reason == "too_long"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILE_VERIFIERS), st.text(max_size=80))
def test_any_text_gives_a_verdict(verifier: str, text: str) -> None:
    assert isinstance(verify(make(verifier), text), Verdict)
    assert isinstance(verify_lenient(make(verifier), text), Verdict)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="[](){}'\",:0123456789.e+-jTrueFalse \\\n*", max_size=120))
def test_any_near_literal_gives_a_verdict(text: str) -> None:
    assert isinstance(verify(make("literal"), text), Verdict)


def test_worst_texts_are_fast() -> None:
    start = time.perf_counter()
    for verifier in FILE_VERIFIERS:
        for piece in ("-", "(", "1,", "a ", "'", "answer ", "1/", "\\"):
            verify_lenient(make(verifier), (piece * MAX_ANSWER_CHARS)[:MAX_ANSWER_CHARS])
    assert time.perf_counter() - start < 3


def test_dicts_and_sets_compare_by_type() -> None:
    assert verify(make("literal", "{1: {2, 3}}"), "{1: {3, 2}}").correct
    assert not verify(make("literal", "{1: {2, 3}}"), "{True: {3, 2}}").correct


def test_lenient_is_more_generous_and_separate() -> None:
    said = "I think the answer is -42."
    assert not verify(make("integer"), said).correct
    assert verify_lenient(make("integer"), said).correct
    assert verify_lenient(make("exact"), "The answer is: Green box.").correct
    assert not verify_lenient(make("exact"), "red box").correct
    assert verify_lenient(make("list"), "[3, 1, 2]").correct


def test_unknown_verifier_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="integer"):
        verify(Problem("t", 1, "p", "1", "intger"), "1")
