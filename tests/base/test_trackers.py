"""Trackers against the real packages, and what failing, hanging and slow ones may not do to a run."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gnomon.base import trackers
from gnomon.base.config import Config
from gnomon.base.errors import ConfigError, UnknownNameError
from gnomon.base.runs import create_run
from gnomon.base.trackers import Tracker, check_names, open_trackers

CONFIG = {"steps": 9, "optim": {"lr": 0.01}}


class Small(Config):
    lr: float = 0.5


class Recorder:
    """A sink that remembers; `fail_at` raises at that step, `hang` waits for ever."""

    def __init__(self, fail_at: int | None = None, hang: bool = False) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.samples: list[tuple[int, str]] = []
        self.fail_at, self.hang, self.closed = fail_at, hang, False
        self.release = threading.Event()

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        if self.hang:
            self.release.wait(30)
        if step == self.fail_at:
            raise OSError("disk of the tracker is full")
        self.rows.append((step, dict(values)))

    def sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))

    def config(self, values: Mapping[str, Any]) -> None:
        self.seen = dict(values)

    def close(self) -> None:
        self.closed = True


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_hands_every_row_and_sample_on(tmp_path: Path) -> None:
    sink = Recorder()
    with create_run("demo", Small(), tmp_path) as run:
        run.trackers.append(Tracker("mine", sink))
        for step in (1, 2, 3):
            run.row(step, **{"train/loss": 1.0 / step, "train/lr": float("inf")})
        path = run.sample(3, [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "x", "answer": float("nan")}])
    assert [(s, v["train/loss"], v["train/lr"]) for s, v in sink.rows] == [
        (1, 1.0, None),
        (2, 0.5, None),
        (3, 1 / 3, None),
    ]
    assert sink.closed
    assert sink.samples[0][0] == 3
    assert "prompt: 2 + 2?\nanswer: 4" in sink.samples[0][1]
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == ["4", None]


def test_a_failing_tracker_is_given_up_with_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    good, bad = Recorder(), Recorder(fail_at=2)
    with create_run("demo", Small(), tmp_path) as run:
        run.trackers += [Tracker("bad", bad), Tracker("good", good)]
        for step in range(1, 6):
            run.row(step, **{"train/loss": 1.0})
            while step == 2 and run.trackers[0].failure is None:
                time.sleep(0.01)
    assert [s for s, _ in bad.rows] == [1]
    assert [s for s, _ in good.rows] == [1, 2, 3, 4, 5]
    warned = [e for e in events(run.folder) if e["event"] == "tracker/failed"]
    assert [(e["tracker"], e["level"]) for e in warned] == [("bad", "warning")]
    assert "disk of the tracker is full" in warned[0]["why"]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_hanging_tracker_neither_slows_rows_nor_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Recorder(hang=True)
    tracker = Tracker("slow", sink, waiting=10)
    began = time.monotonic()
    for step in range(1000):
        tracker.row(step, {"train/loss": 1.0})
    assert time.monotonic() - began < 0.5
    assert tracker.dropped >= 988
    trackers.close_all([tracker], patience=0.2)
    assert time.monotonic() - began < 1.0
    assert tracker.failure
    sink.release.set()


def test_names_and_missing_packages_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tensorboard'"):
        open_trackers(["tensorbord"], tmp_path, "x", CONFIG)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gnomon\[track\]"):
        check_names(["wandb"])
    with pytest.raises(ConfigError, match=r"gnomon\[track\]"):
        open_trackers(["tensorboard"], tmp_path, "x", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_refuses_to_start_is_an_error_and_closes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Recorder()

    def broken(folder: Path, name: str, start: int) -> Recorder:
        raise RuntimeError("protobuf of another age")

    monkeypatch.setattr(trackers, "check_names", lambda names: None)
    monkeypatch.setattr(trackers, "SINKS", {"good": lambda *_: good, "broken": broken})
    with pytest.raises(ConfigError, match="protobuf of another age"):
        open_trackers(["good", "broken"], tmp_path, "x", CONFIG)
    assert good.closed


def board(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_reads_back_and_forgets_undone_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = open_trackers(["tensorboard", "tensorboard"], tmp_path, "x", CONFIG)
    assert len(first) == 1
    for step in range(1, 8):
        first[0].row(step, {"train/loss": 1.0 / step, "step": step, "time": 1e9, "train/lr": None})
    first[0].sample(4, "question\nanswer")
    first[0].close()
    again = open_trackers(["tensorboard"], tmp_path, "x", CONFIG, start=5)[0]  # killed behind 7, resumed behind 5
    for step in (6, 7, 8):
        again.row(step, {"train/loss": 100.0 + step})
    again.row(7, {"train/loss": 207.0})  # a roll-back inside a session
    again.row(8, {"train/loss": 208.0})
    again.close()
    assert again.failure is None
    found = board(tmp_path)
    assert found.Tags()["scalars"] == ["train/loss"]
    got = {e.step: round(e.value, 5) for e in found.Scalars("train/loss")}
    assert got == {1: 1.0, 2: 0.5, 3: 0.33333, 4: 0.25, 5: 0.2, 6: 106.0, 7: 207.0, 8: 208.0}
    assert len(found.Scalars("train/loss")) == len(got)
    texts = {tag: b"".join(found.Tensors(tag)[-1].tensor_proto.string_val) for tag in found.Tags()["tensors"]}
    assert b"question\n    answer" in texts["samples/text_summary"]
    assert b"lr: 0.01" in texts["config/text_summary"]


def test_wandb_stays_offline_in_the_run_folder(tmp_path: Path) -> None:
    """In a process of its own, without a network: whatever it would ask or fetch fails there."""
    pytest.importorskip("wandb")
    code = (
        "import sys, pathlib; from gnomon.base.trackers import open_trackers\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        f"t = open_trackers(['wandb'], folder, 'x', {CONFIG!r})[0]\n"
        "[t.row(s, {'train/loss': 1.0 / s}) for s in (1, 2, 3, 2, 3)]; t.sample(3, 'a')\n"
        "t.close(); print(t.failure)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, timeout=120, check=True
    )
    assert done.stdout == "None\n"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_wandb_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        open_trackers(["wandb"], tmp_path, "x", CONFIG)


def test_trackio_writes_its_local_store(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys, pathlib; from gnomon.base.trackers import open_trackers\n"
        "for start in (0, 2):\n"
        f"    t = open_trackers(['trackio'], pathlib.Path(sys.argv[1]), 'x', {CONFIG!r}, start)[0]\n"
        "    [t.row(s, {'train/loss': 1.0 / s}) for s in (start + 1, start + 2)]; t.sample(start + 2, 'a'); t.close()\n"
        "    assert t.failure is None, t.failure"
    )
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, timeout=120, check=True
    )
    assert done.stdout == "", "results only on stdout"
    with sqlite3.connect(tmp_path / "store" / "gnomon.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    losses = [(name, step, json.loads(m)["train/loss"]) for name, step, m in rows if "train/loss" in json.loads(m)]
    assert losses == [("x", 1, 1.0), ("x", 2, 0.5), ("x-from-2", 3, 1 / 3), ("x-from-2", 4, 0.25)]
