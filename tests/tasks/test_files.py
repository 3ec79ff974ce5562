"""JSONL task files: strict records, numbered and counted rejects, splits by text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gnomon.base.errors import ConfigError, DataError
from gnomon.tasks import files
from gnomon.tasks.procedural import problems, resolve_tasks
from gnomon.tasks.verifiers import verify

GOOD = b'{"prompt": "What is 2 + 2?", "answer": "4", "verifier": "integer"}'


def report(tmp_path: Path, *lines: bytes) -> files.FileReport:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join(lines))
    return files.read_file(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "answer": "4", "answer": "5", "verifier": "exact"}', "twice"),
        (b'{"prompt": "a", "answer": NaN, "verifier": "exact"}', "NaN"),
        (b'{"prompt": "a", "answer": 1e999, "verifier": "exact"}', "too large"),
        (b'{"prompt": "a", "answer": 4, "verifier": "integer"}', "string"),
        (b'{"prompt": "a", "answer": "", "verifier": "exact"}', "empty"),
        (b'{"prompt": "a", "answer": "four", "verifier": "integer"}', "own verifier"),
        (b'{"prompt": "a", "answer": "open(", "verifier": "literal"}', "own verifier"),
        (b'{"prompt": "a", "answer": "4", "verifier": "intger"}', "integer"),
        (b'{"prompt": "a", "answr": "4", "verifier": "exact"}', "answer"),
        (b'{"prompt": "a", "answer": "4"}', "missing"),
        (b'{"prompt": "\xff", "answer": "4", "verifier": "exact"}', "UTF-8"),
        (rb'{"prompt": "\ud800", "answer": "4", "verifier": "exact"}', "surrogate"),
        (b"[" * 100_000, "deep"),
        (b"nope", "not JSON"),
        (b'["a"]', "list"),
        (b'{"prompt": "' + b"x" * 2**20 + b'", "answer": "4", "verifier": "exact"}', "longer"),
        (b'{"prompt": "what IS 2  + 2?", "answer": "4", "verifier": "exact"}', "same prompt"),
    ],
)
def test_bad_record_is_numbered_counted_and_explained(tmp_path: Path, line: bytes, reason: str) -> None:
    found = report(tmp_path, GOOD, b"", line, GOOD.replace(b"2 + 2", b"3 + 1"))
    assert len(found.problems) == 2
    assert found.rejected == 1
    assert found.rejects[0].line == 3
    assert reason in found.rejects[0].reason


def test_rejects_are_all_counted_and_the_first_are_named(tmp_path: Path) -> None:
    found = report(tmp_path, GOOD, *[b"bad"] * 250)
    assert found.rejected == 250
    assert len(found.rejects) == files.MAX_NAMED_REJECTS


def test_file_without_a_usable_record_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record 1: not JSON"):
        report(tmp_path, b"bad")
    with pytest.raises(DataError, match="does not exist"):
        files.read_file(tmp_path / "none.jsonl")


def test_split_by_text_and_streams_are_orders(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"say {i}", "answer": str(i), "verifier": "exact"} for i in range(400)]
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    (source,) = resolve_tasks(str(path))
    counts = {s: source.capacity(1, s) or 0 for s in ("train", "val", "calibration", "test")}
    assert sum(counts.values()) == 400
    assert counts["train"] > 240
    a = problems(str(path), "test", "a", counts["test"])
    b = problems(str(path), "test", "b", counts["test"])
    assert {p.prompt for p in a} == {p.prompt for p in b}
    assert [p.prompt for p in a] != [p.prompt for p in b]
    assert all(verify(p, p.answer).correct and not verify(p, p.answer + "0").correct for p in a)
    with pytest.raises(ConfigError, match=f"has {counts['test']} distinct"):
        problems(str(path), "test", "a", counts["test"] + 1)
