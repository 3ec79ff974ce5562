"""Problems from a JSONL file: one object {"prompt", "answer", "verifier"} per line, read strictly.

A record that cannot be used is counted and named by its line number and reason; nothing is skipped in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from gnomon.base import seeds
from gnomon.base.errors import DataError, nearest
from gnomon.tasks.problem import Problem
from gnomon.tasks.splits import canonical, check_split, split_of
from gnomon.tasks.verifiers import FILE_VERIFIERS, MAX_ANSWER_CHARS, verify

MAX_FILE_BYTES: Final = 512 * 2**20
MAX_LINE_BYTES: Final = 2**20
MAX_PROMPT_CHARS: Final = 64_000
MAX_RECORDS: Final = 1_000_000
MAX_NAMED_REJECTS: Final = 100
_KEYS: Final = ("prompt", "answer", "verifier")


@dataclass(frozen=True)
class Reject:
    """A record that was not used: 1-based line number and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class FileReport:
    """Usable problems, how many records were rejected, and the first of the rejects with their reasons."""

    problems: tuple[Problem, ...]
    rejected: int
    rejects: tuple[Reject, ...]


class _Bad(Exception):
    """The reason why one record is rejected."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Bad(f"key {key!r} appears twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise _Bad(f"{text} is not JSON; write a finite number or a string")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Bad(f"number {text[:40]} is too large")
    return value


def parse_line(raw: bytes) -> Any:
    """Strict JSON value of one line: UTF-8, no duplicate keys, no NaN or infinity. Raises DataError."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Bad as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start} of the line)") from None
    except UnicodeEncodeError:
        raise DataError("a lone surrogate escape; write the character itself or a full pair") from None
    except RecursionError:
        raise DataError("nested too deeply") from None
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from None
    return value


def parse_record(value: Any, name: str, index: int) -> Problem:
    """A parsed object -> Problem. Raises DataError with what is wrong and what to write."""
    if not isinstance(value, dict):
        raise DataError(f"a record is an object with {', '.join(_KEYS)}, not a {type(value).__name__}")
    for key in value:
        if key not in _KEYS:
            hint = nearest(key, _KEYS)
            raise DataError(f"unknown key {key!r}" + (f"; did you mean {hint!r}?" if hint else f"; known: {_KEYS}"))
    for key in _KEYS:
        if key not in value:
            raise DataError(f"key {key!r} is missing")
        if not isinstance(value[key], str):
            raise DataError(f"{key!r} is a {type(value[key]).__name__}; write it as a string")
        if not value[key].strip():
            raise DataError(f"{key!r} is empty")
    if len(value["prompt"]) > MAX_PROMPT_CHARS or len(value["answer"]) > MAX_ANSWER_CHARS:
        raise DataError(f"prompt above {MAX_PROMPT_CHARS} or answer above {MAX_ANSWER_CHARS} characters")
    verifier = value["verifier"]
    if verifier not in FILE_VERIFIERS:
        hint = nearest(verifier, FILE_VERIFIERS)
        tail = f"; did you mean {hint!r}?" if hint else ""
        raise DataError(f"unknown verifier {verifier!r}{tail} Known: {', '.join(FILE_VERIFIERS)}")
    prompt = value["prompt"]
    problem = Problem(name, 1, prompt, value["answer"], verifier, {}, split_of(prompt), "file", index)
    try:
        verdict = verify(problem, problem.answer)
    except (ValueError, AttributeError, TypeError):
        verdict = None
    if verdict is None or not verdict.correct:
        raise DataError(f"the answer {problem.answer[:60]!r} does not pass its own verifier {verifier!r}")
    return problem


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes), None for a line above the cap; blank lines are left out."""
    with path.open("rb") as file:
        number = 0
        while True:
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                yield number, None
            elif raw.strip():
                yield number, raw


def read_file(path: Path) -> FileReport:
    """All usable records of a JSONL file. Raises DataError when the file is missing, too large, or has none."""
    if not path.is_file():
        raise DataError(f"task file {str(path)!r} does not exist; give the path of a .jsonl file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"task file {str(path)!r} has {path.stat().st_size} bytes; the limit is {MAX_FILE_BYTES}")
    name = f"file:{path.stem}"
    found: dict[str, Problem] = {}
    rejects: list[Reject] = []
    rejected = 0
    for number, raw in _lines(path):
        try:
            if len(found) >= MAX_RECORDS:
                raise DataError(f"more than {MAX_RECORDS} records")
            if raw is None:
                raise DataError(f"longer than {MAX_LINE_BYTES} bytes")
            problem = parse_record(parse_line(raw), name, len(found))
            key = canonical(problem.prompt)
            if key in found:
                raise DataError("the same prompt as an earlier record")
            found[key] = problem
        except DataError as error:
            rejected += 1
            if len(rejects) < MAX_NAMED_REJECTS:
                rejects.append(Reject(number, str(error)))
    if not found:
        why = f"; record {rejects[0].line}: {rejects[0].reason}" if rejects else "; it is empty"
        raise DataError(f"task file {str(path)!r} has no usable record ({rejected} rejected){why}")
    return FileReport(tuple(found.values()), rejected, tuple(rejects))


@dataclass(frozen=True)
class FileSource:
    """A JSONL file as a source of problems (level 1 only). `report` says what was rejected and why."""

    path: Path
    levels: tuple[int, ...] = (1,)

    @property
    def name(self) -> str:
        return f"file:{self.path.stem}"

    @cached_property
    def report(self) -> FileReport:
        return read_file(self.path)

    def _pool(self, split: str) -> list[Problem]:
        return [p for p in self.report.problems if p.split == check_split(split)]

    def capacity(self, level: int, split: str) -> int | None:
        """Exactly how many records fall in the split (by the hash of their prompt)."""
        return len(self._pool(split))

    def draw(self, level: int, split: str, stream: str, index: int) -> Problem:
        """Record `index` of the split in the order of this stream. Raises DataError past the end."""
        pool = self._pool(split)
        if index >= len(pool):
            raise DataError(f"{self.name} has {len(pool)} {split} records; record {index + 1} was asked")
        return sorted(pool, key=lambda p: seeds.derive("file", stream, canonical(p.prompt)))[index]
