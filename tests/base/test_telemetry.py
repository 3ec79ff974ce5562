"""Events, metrics rows and progress."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from gnomon.base.telemetry import ConsoleSink, JsonlSink, JsonlWriter, MemorySink, Progress, Telemetry, finite, track


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nan_becomes_null_and_is_named() -> None:
    values = {"train/loss": float("nan"), "lr": np.float32(0.5), "by": {"a": [1.0, float("inf")]}, "n": np.int64(3)}
    found = finite(values)
    assert found == {
        "train/loss": None, "lr": 0.5, "by": {"a": [1.0, None]}, "n": 3.0, "nonfinite": ["train/loss", "by.a.1"],
    }  # fmt: skip


def test_rows_are_on_disk_before_the_next_line_runs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1, "train/loss": float("inf"), "text": "a\nb \ud800"})
    assert rows(path) == [{"step": 1, "train/loss": None, "text": "a\nb ?", "nonfinite": ["train/loss"]}]


def test_a_torn_last_line_is_cut_on_reopening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    writer = JsonlWriter(path)
    writer.write({"step": 2})
    writer.close()
    writer.close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_every_sink_gets_every_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, shown = MemorySink(), io.StringIO()
    with Telemetry(memory, JsonlSink(tmp_path / "e.jsonl"), ConsoleSink("warning", shown)) as telemetry:
        telemetry.emit("train/start", seed=3)
        telemetry.emit("checkpoint/skipped", level="warning", reason="torn", share=0.123456)
    assert [e.name for e in memory.events] == ["train/start", "checkpoint/skipped"]
    assert [r["event"] for r in rows(tmp_path / "e.jsonl")] == ["train/start", "checkpoint/skipped"]
    assert shown.getvalue() == "warning: checkpoint/skipped reason=torn share=0.1235\n"
    assert capsys.readouterr().out == ""


def test_progress_reports_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", total=4, every=0.0) as bar:
        assert bar.eta() is None
        bar.advance(2, "half")
        assert bar.eta() is not None
    assert list(track([1, 2, 3], "quiet one", quiet=True)) == [1, 2, 3]
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "work: 2/4" in caught.err
    assert "left half" in caught.err
    assert "quiet one" not in caught.err
    assert caught.err.endswith("half done\n")
