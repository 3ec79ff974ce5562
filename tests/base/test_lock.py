"""The run lock: one process, named to the others, gone with its process however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gnomon.base import lock as locks
from gnomon.base.errors import GnomonError, RunBusyError
from gnomon.base.lock import RunLock, probe

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
HOLD = """
import os, sys, time
from pathlib import Path
from gnomon.base.lock import RunLock
with RunLock(Path(sys.argv[1])):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    elif sys.argv[2:] != ["fork"]:
        print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *how: str) -> tuple[subprocess.Popen[bytes], bytes]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *how], stdout=subprocess.PIPE, env=ENV)
    assert child.stdout is not None
    return child, child.stdout.readline()


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    child, _ = hold(tmp_path)
    try:
        assert probe(tmp_path) == child.pid
        with pytest.raises(RunBusyError) as caught:
            RunLock(tmp_path).acquire()
        year = time.strftime("%Y-", time.gmtime())
        for part in (str(tmp_path), f"process {child.pid}, since {year}", f"kill {child.pid}", "another run folder"):
            assert part in str(caught.value)
        assert caught.value.pid == child.pid
    finally:
        child.kill()
        child.wait()
    assert probe(tmp_path) is None
    with RunLock(tmp_path) as mine:  # what the killed one wrote misleads nobody
        assert mine.held and probe(tmp_path) == os.getpid()
    assert not mine.held and probe(tmp_path) is None


def test_a_forked_child_does_not_keep_a_dead_run_locked(tmp_path: Path) -> None:
    child, line = hold(tmp_path, "fork")
    worker = int(line)
    try:
        assert probe(tmp_path) == child.pid
        child.kill()
        child.wait()
        os.kill(worker, 0)  # a data loader's worker that is left over
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_fork_neither_holds_nor_frees_the_lock(tmp_path: Path) -> None:
    mine = RunLock(tmp_path).acquire()
    pid = os.fork()
    if pid == 0:
        mine.release()
        os._exit(7 if mine.held else 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert probe(tmp_path) == os.getpid()
    mine.release()
    mine.release()
    assert probe(tmp_path) is None


def test_one_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path) as mine:
        assert mine.acquire() is mine
        with pytest.raises(RunBusyError, match=r"\(this one\)"):
            RunLock(tmp_path).acquire()


def test_after_an_error_it_is_free(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path):
        raise KeyboardInterrupt
    assert probe(tmp_path) is None


def test_probing_disturbs_nobody(tmp_path: Path) -> None:
    """A prober holds the lock for an instant; who starts just then waits that instant."""
    with RunLock(tmp_path):
        pass
    handle = os.open(tmp_path / ".lock", os.O_RDONLY)
    assert locks._flock(handle, "shared")
    timer = threading.Timer(0.05, os.close, [handle])
    timer.start()
    with RunLock(tmp_path):
        assert probe(tmp_path) == os.getpid()
    timer.join()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\x00" * 50])
def test_an_unreadable_name_is_no_obstacle(tmp_path: Path, text: str) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text(text)
        assert probe(tmp_path) == -1
        with pytest.raises(RunBusyError, match="another process works in it"):
            RunLock(tmp_path).acquire()
    (tmp_path / ".lock").write_text(text)
    assert probe(tmp_path) is None
    with RunLock(tmp_path):
        assert probe(tmp_path) == os.getpid()


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GnomonError, match="cannot lock the run folder .*file"):
        RunLock(tmp_path / "file" / "run").acquire()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(GnomonError, match="cannot lock the run folder"):
        RunLock(tmp_path / "link").acquire()
    assert (tmp_path / "file").read_text() == "x"
    assert probe(tmp_path / "none") is None
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(GnomonError, match="need Linux, macOS or WSL"):
        RunLock(tmp_path / "windows").acquire()
