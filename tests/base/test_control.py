"""Commands to a running run: numbered, whole, checked on both sides, answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base import control
from gnomon.base.control import ACK, COMMANDS, Ack, Command, ControlReader, Rejected, send, wait_ack
from gnomon.base.errors import ConfigError
from gnomon.base.lock import RunLock
from gnomon.base.telemetry import JsonlSink, Telemetry
from gnomon.interfaces import cli

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
GOOD = [("pause", None), ("lr", 3e-4), ("lr", 1), ("budget", 0), ("budget", 128), ("budget", None), ("stop", None)]


def brief(found: list[Command | Rejected]) -> list[tuple[str, Any]]:
    return [(c.name, c.value) for c in found if isinstance(c, Command)]


def test_commands_arrive_in_order_with_their_numbers(tmp_path: Path) -> None:
    reader = ControlReader(tmp_path)
    assert reader.poll() == []
    assert [send(tmp_path, name, value) for name, value in GOOD] == [1, 2, 3, 4, 5, 6, 7]
    found = reader.poll()
    assert brief(found) == GOOD
    assert [c.seq for c in found if isinstance(c, Command)] == [1, 2, 3, 4, 5, 6, 7]
    assert reader.poll() == []
    assert {type(v) for n, v in brief(found) if n == "lr"} == {float}
    for name in COMMANDS:
        send(tmp_path, name, 1 if name == "lr" else None)
    assert [n for n, _ in brief(reader.poll())] == list(COMMANDS)


def test_what_was_sent_before_the_start_is_history(tmp_path: Path) -> None:
    send(tmp_path, "stop")
    reader = ControlReader(tmp_path)
    send(tmp_path, "pause")
    assert brief(reader.poll()) == [("pause", None)]
    assert brief(ControlReader(tmp_path, from_start=True).poll()) == [("stop", None), ("pause", None)]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("puase", None, "did you mean 'pause'"),
        ("lr", None, "3e-4"),
        ("lr", 0, "above 0"),
        ("lr", -1e-3, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("lr", float("inf"), "above 0"),
        ("lr", 10**400, "above 0"),
        ("lr", True, "above 0"),
        ("lr", "3e-4", "above 0"),
        ("budget", 1.5, "whole number"),
        ("budget", -1, "whole number"),
        ("budget", True, "whole number"),
        ("budget", float("nan"), "whole number"),
        ("budget", "many", "whole number"),
        ("pause", 3, "takes no value"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_written(
    tmp_path: Path, name: str, value: object, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        send(tmp_path, name, value)
    assert not (tmp_path / "control.jsonl").exists()
    with pytest.raises(ConfigError, match="no run folder"):
        send(tmp_path / "none", "pause")


def test_torn_and_malformed_lines_are_told_once(tmp_path: Path) -> None:
    reader = ControlReader(tmp_path)
    file = tmp_path / "control.jsonl"
    bad: list[tuple[bytes, str]] = [
        (b"hello", "no command"),
        (b"[1]", "no command"),
        (b'{"seq": 1}', "no command"),
        (b'{"seq": 0, "command": "pause"}', "from 1 up"),
        (b'{"seq": true, "command": "pause"}', "from 1 up"),
        (b'{"seq": 9, "command": "jump"}', "unknown command"),
        (b'{"seq": 9, "command": "lr", "value": NaN}', "above 0"),
        (b'{"seq": 9, "command": "lr", "value": "1"}', "above 0"),
        (b'{"seq": 9, "command": ["pause"]}', "no command"),
        (b'{"seq": 9, "command": "stop", "time": "now"}', "no time"),
        (b"\xff\xfe", "no command"),
        (b"[" * 4000, "no command"),
        (b'"' + b"x" * 5000 + b'"', "more than 4096 bytes"),
    ]
    file.write_bytes(b"\n".join(line for line, _ in bad) + b'\n\n{"seq": 20, "comm')
    found = reader.poll()
    assert [r.line for r in found if isinstance(r, Rejected)] == list(range(1, len(bad) + 1))
    for rejected, (_, why) in zip(found, bad, strict=True):
        assert isinstance(rejected, Rejected) and why in rejected.why
    assert reader.poll() == []  # the torn line waits for its rest
    with file.open("ab") as out:
        out.write(b'and": "pause"}\n')
    assert reader.poll() == [Command(20, "pause")]


def test_a_sender_that_died_in_its_line_spoils_no_other(tmp_path: Path) -> None:
    reader = ControlReader(tmp_path)
    send(tmp_path, "pause")
    with (tmp_path / "control.jsonl").open("ab") as out:
        out.write(b'{"seq": 2, "ti')
    assert send(tmp_path, "stop") == 2
    found = reader.poll()
    assert brief(found) == [("pause", None), ("stop", None)]
    assert [r.line for r in found if isinstance(r, Rejected)] == [2]
    late = ControlReader(tmp_path)
    (tmp_path / "control.jsonl").write_bytes((tmp_path / "control.jsonl").read_bytes() + b"\n")
    assert late.poll() == []


def test_a_flood_without_a_newline_takes_no_memory_and_is_told_once(tmp_path: Path) -> None:
    reader = ControlReader(tmp_path)
    file = tmp_path / "control.jsonl"
    told: list[object] = []
    for _ in range(5):
        with file.open("ab") as out:
            out.write(b"x" * 100_000)
        told += reader.poll()
    assert len(told) == 1 and len(reader._part) == 0
    send(tmp_path, "pause")
    assert brief(reader.poll()) == [("pause", None)]


def test_a_cut_or_replaced_file_replays_nothing(tmp_path: Path) -> None:
    file = tmp_path / "control.jsonl"
    send(tmp_path, "stop")
    reader = ControlReader(tmp_path)
    send(tmp_path, "pause")
    send(tmp_path, "resume")
    assert len(reader.poll()) == 2
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]))
    found = reader.poll()
    assert brief(found) == []
    assert [r.line for r in found if isinstance(r, Rejected)] == [0, 1, 2]
    file.unlink()
    assert reader.poll() == []
    assert send(tmp_path, "checkpoint") == 1
    assert brief(reader.poll()) == [("checkpoint", None)]


def test_an_unreadable_file_is_told_once_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "control.jsonl").mkdir()
    reader = ControlReader(tmp_path, from_start=True)
    found = reader.poll()
    assert len(found) == 1 and "cannot be read" in str(found[0])
    assert reader.poll() == []
    with pytest.raises(ValueError, match="cannot send pause"):
        send(tmp_path, "pause")


@given(st.lists(st.binary(max_size=60), max_size=8), st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_no_bytes_make_the_reader_raise(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], cut: int) -> None:
    """However a file is cut into writes, the reader says the same."""
    data = b"\n".join(parts) + b"\n"
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    (whole / "control.jsonl").write_bytes(data)
    at_once = ControlReader(whole, from_start=True).poll()
    reader = ControlReader(pieces, from_start=True)
    (pieces / "control.jsonl").write_bytes(data[:cut])
    told = reader.poll()
    with (pieces / "control.jsonl").open("ab") as out:
        out.write(data[cut:])
    assert told + reader.poll() == at_once


def test_senders_at_the_same_time_get_numbers_of_their_own(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gnomon.base.control import send\n"
        "[send(Path(sys.argv[1]), 'lr', 1 + i) for i in range(25)]"
    )
    reader = ControlReader(tmp_path)
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=ENV) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    found = reader.poll()
    assert [c.seq for c in found if isinstance(c, Command)] == list(range(1, 101)) and len(found) == 100


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(tmp_path, "pause")
    before = (tmp_path / "control.jsonl").read_bytes()
    real = os.write

    def half(handle: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(handle, data[:-10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(ValueError, match="No space left"):
            send(tmp_path, "stop")
    assert (tmp_path / "control.jsonl").read_bytes() == before


def answer(run: Path, ok: bool = True, why: str = "") -> threading.Thread:
    """A run that answers its next command, 0.1 s later."""
    reader, events = ControlReader(run), Telemetry(JsonlSink(run / "events.jsonl"))

    def work() -> None:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            for c in reader.poll():
                assert isinstance(c, Command)
                time.sleep(0.1)
                events.emit("train/step", text=f"{ACK} of another kind")
                events.emit(ACK, seq=c.seq + 1, command="stop", value=None, ok=True, why="of another command")
                events.emit(ACK, step=5, **Ack(c.seq, c.name, c.value, ok, why).facts())
                events.close()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_the_answer_is_waited_for(tmp_path: Path) -> None:
    thread = answer(tmp_path, why="as you wish")
    seq = send(tmp_path, "lr", 1e-3)
    assert wait_ack(tmp_path, seq, 5) == Ack(seq, "lr", 1e-3, True, "as you wish")
    thread.join()
    assert wait_ack(tmp_path, 99, 0.1) is None
    assert wait_ack(tmp_path, seq, 0.1, since=time.time() + 1) is None  # of an earlier control.jsonl
    assert wait_ack(tmp_path / "none", 1, 0.1) is None


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrain-20260101T000000Z"
    folder.mkdir()
    (folder / "status.json").write_text('{"state": "running"}')
    return folder


def call(run: Path, *words: str) -> int:
    return cli.run(["control", "pretrain", *words, "--root", str(run.parent)])


def test_a_command_line_sends_and_prints_the_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run):
        thread = answer(run)
        assert call(run, "lr", "3e-4", "--json") == 0
        thread.join()
        told = json.loads(capsys.readouterr().out)
        assert (told["command"], told["value"], told["seq"], told["ok"], told["pid"]) == (
            "lr",
            3e-4,
            1,
            True,
            os.getpid(),
        )
        thread = answer(run, ok=False, why="nothing was changed")
        assert call(run, "undo") == 1
        thread.join()
        assert f"{run.name}: undo refused: nothing was changed" in capsys.readouterr().err
        thread = answer(run)
        assert call(run, "budget", "none", "--json") == 0
        thread.join()
        assert json.loads(capsys.readouterr().out)["value"] is None


def test_a_command_line_says_when_nobody_answers_or_nobody_is_there(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock(run):
        assert call(run, "pause", "--timeout", "0.1") == 1
    assert "no answer within 0.1 s" in capsys.readouterr().err
    assert call(run, "pause") == 2
    assert f"no process works in {run} (state: crashed), so nothing was sent" in capsys.readouterr().err
    assert len((run / "control.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["puase"], "did you mean 'pause'"),
        (["lr"], "gnomon control RUN lr 3e-4"),
        (["budget"], "gnomon control RUN budget 128"),
        (["lr", "fast"], "'fast'; write a number above 0"),
        (["lr", "nan"], "above 0"),
        (["budget", "-5"], "whole number"),
        (["pause", "5"], "takes no value"),
    ],
)
def test_a_wrong_command_line_teaches(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with RunLock(run):
        assert call(run, *words) == 2
    assert told in capsys.readouterr().err
    assert not (run / "control.jsonl").exists()


def test_names_of_events_are_as_promised() -> None:
    assert (control.FILE, control.EVENTS, ACK) == ("control.jsonl", "events.jsonl", "control/ack")
