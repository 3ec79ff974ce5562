"""A run from outside: alive or died, how far, which checkpoints are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gnomon.base.checkpoint import publish
from gnomon.base.config import Config
from gnomon.base.lock import RunLock
from gnomon.base.run_facts import facts, listing, liveness
from gnomon.base.runs import Run, create_run
from gnomon.interfaces import cli


class Small(Config):
    lr: float = 0.5
    steps: int = 9


def started(root: Path) -> Run:
    return create_run("demo", Small(lr=0.25), root, {"lr": "override"}, seed=3)


def test_a_running_state_needs_a_living_process(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me, now = os.getpid(), time.time()
    assert liveness(tmp_path, {"state": "running", "pid": me, "started": now}) == "running"
    assert liveness(tmp_path, {"state": "paused", "pid": me, "started": now}) == "paused"
    assert liveness(tmp_path, {"state": "running", "pid": gone.pid, "started": now}) == "died"
    assert liveness(tmp_path, {"state": "running"}) == "died"
    assert liveness(tmp_path, {"state": "done", "pid": gone.pid}) == "done"
    assert liveness(tmp_path, {}) == "unreadable"
    long_ago = now - 40 * 365 * 86400  # that process has ended, its number is now ours
    assert liveness(tmp_path, {"state": "running", "pid": me, "started": long_ago}) == "died"
    assert liveness(tmp_path, {"state": "running", "pid": gone.pid, "started": now, "host": "elsewhere"}) == "running"


def test_where_there_is_a_lock_the_lock_decides(tmp_path: Path) -> None:
    status = {"state": "running", "pid": os.getpid(), "started": time.time()}
    with RunLock(tmp_path):
        assert liveness(tmp_path, {**status, "pid": 2**22 + 1}) == "running"
    assert liveness(tmp_path, status) == "died"


def test_facts_name_what_changed_and_which_checkpoints_are_whole(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.row(1, **{"train/loss": 2.5})
    run.status("running", step=1, total=9, loss=2.5)
    for step in (1, 2, 3):
        with publish(run.checkpoints, step) as folder:
            (folder / "weights.bin").write_bytes(bytes(range(200)))
    damaged = run.checkpoints / "checkpoint-2" / "weights.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    (run.checkpoints / "checkpoint-3" / "MANIFEST.json").unlink()
    found = facts(run.folder)
    assert (found["state"], found["step"], found["total"], found["seed"]) == ("running", 1, 9, 3)
    assert found["last"]["train/loss"] == 2.5
    assert found["changed"] == {"lr": (0.25, "override")}
    states = {c["name"]: c["whole"] for c in found["checkpoints"]}
    assert states["checkpoint-1"] == "yes"
    assert "weights.bin" in states["checkpoint-2"]
    assert "not finished" in states["checkpoint-3"]
    assert [c["latest"] for c in found["checkpoints"]] == [False, False, True]
    run.close()


def test_a_torn_status_or_log_is_no_error(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.close()
    (run.folder / "status.json").write_text('{"state": "runn')
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.5}\n{"step": 2, "tra')
    (row,) = listing(tmp_path)
    assert row["state"] == "unreadable"
    assert facts(run.folder)["last"] == {"step": 1, "train/loss": 1.5}


def test_list_and_show_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = started(tmp_path)
    first.status("running", stage="train", step=40, total=1000, loss=1.25)
    with publish(first.checkpoints, 40) as folder:
        (folder / "weights.bin").write_bytes(b"x" * 300)
    first.row(40, **{"train/loss": 1.25})
    assert cli.run(["runs", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "40/1,000" in shown
    assert "1.250" in shown
    assert "running" in shown
    assert cli.run(["runs", "show", first.name, "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint-40 (latest)" in shown
    assert "override" in shown
    assert cli.run(["runs", "show", "latest", "--root", str(tmp_path), "--json", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["whole"] == "yes"
    assert cli.run(["runs", "show", "nothing", "--root", str(tmp_path)]) == cli.USER_ERROR
    first.close()
