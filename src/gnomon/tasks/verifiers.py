"""Verifiers: is this answer text right? `verify` is strict, `verify_lenient` is the named exception.

Both are total on the answer text: whatever a model writes gives a Verdict, never an exception, and texts above
`MAX_ANSWER_CHARS` are refused unread. Nothing here executes text; literals go through `ast.literal_eval` with caps.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from gnomon.base.errors import unknown
from gnomon.tasks.problem import Problem

MAX_ANSWER_CHARS: Final = 4096
_MAX_DEPTH: Final = 40
_MAX_DIGITS: Final = 1000
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+|/[0-9]+)?")


@dataclass(frozen=True)
class Verdict:
    """`correct`; `reason` in one word (`ok, wrong, empty, format, too_long, …`); `extracted` = what was read."""

    correct: bool
    reason: str
    extracted: str = ""


def _verdict(right: bool, extracted: str) -> Verdict:
    return Verdict(right, "ok" if right else "wrong", extracted[:200])


def _bad_format(text: str) -> Verdict:
    return Verdict(False, "format", text[:200])


def squeeze(text: str) -> str:
    """Text with outer whitespace removed and inner whitespace collapsed to single blanks."""
    return " ".join(text.split())


def parse_number(text: str) -> Fraction | None:
    """Exact value of `12`, `-0.5` or `3/4` (ASCII digits, nothing around them); None for anything else."""
    if len(text) > _MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def parse_literal(text: str) -> tuple[bool, Any]:
    """(True, value) of a Python literal, else (False, None). Never executes; bounded in size and nesting."""
    if len(text) > MAX_ANSWER_CHARS or "\x00" in text:
        return False, None
    depth = deepest = 0
    for ch in text:
        depth += (ch in "([{") - (ch in ")]}")
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH or text.count("-") + text.count("+") > 200:
        return False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return True, ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError):
        return False, None


def same_literal(a: Any, b: Any) -> bool:
    """Type-strict equality of literals: 1, 1.0 and True are three different things, at every depth."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_literal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            any(same_literal(k, k2) and same_literal(v, v2) for k2, v2 in b.items()) for k, v in a.items()
        )
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(any(same_literal(x, y) for y in b) for x in a)
    return bool(repr(a) == repr(b)) if isinstance(a, (float, complex)) else bool(a == b)


def _exact(problem: Problem, text: str) -> Verdict:
    return _verdict(squeeze(text) == squeeze(problem.answer), squeeze(text))


def _integer(problem: Problem, text: str) -> Verdict:
    body = text.strip()
    if len(body) > _MAX_DIGITS or not _INTEGER.fullmatch(body):
        return _bad_format(body)
    return _verdict(int(body) == int(problem.answer), body)


def _numeric(problem: Problem, text: str) -> Verdict:
    body = text.strip()
    value = parse_number(body)
    if value is None:
        return _bad_format(body)
    return _verdict(value == parse_number(problem.answer.strip()), body)


def split_list(text: str, comma: bool) -> list[str] | None:
    """Elements of `3, 1, 2` (comma=True) or `3 1 2`; None when an element is empty."""
    parts = [squeeze(p) for p in text.split(",")] if comma else text.split()
    return parts if parts and all(parts) else None


def _list(problem: Problem, text: str) -> Verdict:
    comma = "," in problem.answer
    parts = split_list(text, comma)
    if parts is None:
        return _bad_format(text.strip())
    return _verdict(parts == split_list(problem.answer, comma), squeeze(text))


def _literal(problem: Problem, text: str) -> Verdict:
    known, gold = parse_literal(problem.answer)
    if not known:
        raise ValueError(f"the gold answer of a `literal` problem is no Python literal: {problem.answer!r}")
    valid, value = parse_literal(text)
    if not valid:
        return _bad_format(text.strip())
    try:
        return _verdict(same_literal(value, gold), squeeze(text))
    except (RecursionError, OverflowError):
        return _bad_format(text.strip())


def _program_input(problem: Problem, text: str) -> Verdict:
    from gnomon.tasks import programs

    found = programs.check_input(problem, text)
    return found if isinstance(found, Verdict) else _verdict(bool(found), squeeze(text))


def _gym(problem: Problem, text: str) -> Verdict:
    from gnomon.tasks import gym

    return gym.check(problem, text)


VERIFIERS: Final[dict[str, Callable[[Problem, str], Verdict]]] = {
    "exact": _exact,
    "integer": _integer,
    "numeric": _numeric,
    "list": _list,
    "literal": _literal,
    "program_input": _program_input,
    "gym": _gym,
}
FILE_VERIFIERS: Final = ("exact", "integer", "numeric", "list", "literal")  # what a JSONL row may name


def verify(problem: Problem, answer_text: str) -> Verdict:
    """Strict: the whole text is the answer. UnknownNameError only for a verifier name that does not exist."""
    check = VERIFIERS.get(problem.verifier)
    if check is None:
        raise unknown("verifier", problem.verifier, VERIFIERS)
    if len(answer_text) > MAX_ANSWER_CHARS:
        return Verdict(False, "too_long", answer_text[:200])
    if not answer_text.strip():
        return Verdict(False, "empty")
    return check(problem, answer_text)


_LEAD = re.compile(r"^.*?\b(?:answer|result)\b(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE | re.DOTALL)


def lenient_extract(verifier: str, text: str) -> str:
    """What a friendly reader takes as the answer: the last number, or what follows `the answer is`, bare of quotes."""
    body = text[:MAX_ANSWER_CHARS].strip()
    if verifier in ("integer", "numeric"):
        numbers = _NUMBER.findall(body.replace("\u2212", "-"))
        return numbers[-1] if numbers else body
    body = _LEAD.sub("", body, count=1) or body
    lines = [line for line in body.splitlines() if line.strip()]
    body = (lines[-1] if lines else body).strip().strip("`*").rstrip(".").strip()
    if verifier == "list":
        body = body.strip("[]()")
    return body


def verify_lenient(problem: Problem, answer_text: str) -> Verdict:
    """Lenient reading for diagnosis only (`right but badly written`); no published number uses it."""
    strict = verify(problem, answer_text)
    if strict.correct or strict.reason in ("empty", "too_long"):
        return strict
    found = verify(problem, lenient_extract(problem.verifier, answer_text))
    if found.correct or problem.verifier != "exact":
        return found
    return _verdict(found.extracted.casefold() == squeeze(problem.answer).casefold(), found.extracted)
