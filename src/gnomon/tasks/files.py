"""Problems from a JSONL file: one object {"prompt", "answer", "verifier"} per line, read strictly.

A record that cannot be used is counted and named by its line number and reason; nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from gnomon.base import seeds, strict_json
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
            problem = parse_record(strict_json.loads(raw), name, len(found))
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
