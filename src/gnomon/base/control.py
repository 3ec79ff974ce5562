"""Talking to a running run: numbered commands in control.jsonl, answers in events.jsonl.

Any process may `send`; the run polls a `ControlReader` between steps, acts, and emits an `Ack`. A command is one line
{"seq", "time", "command", "value"}, appended whole under a file lock.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gnomon.base.atomic import disk_error, write_all
from gnomon.base.errors import ConfigError, unknown
from gnomon.base.lock import locked

FILE: Final = "control.jsonl"
EVENTS: Final = "events.jsonl"
ACK: Final = "control/ack"
COMMANDS: Final = {
    "pause": "stop stepping and wait for resume or stop",
    "resume": "go on after pause",
    "checkpoint": "save now",
    "lr": "learning rate from the next step on (a number above 0)",
    "budget": "cap on thinking tokens (an integer from 0 up, or none)",
    "undo": "take the last change of lr or budget back",
    "defaults": "take all changes of lr and budget back",
    "stop": "finish the step, save, end",
}
_LONGEST: Final = 4096  # bytes of a line
_BLOCK: Final = 2**20  # bytes that one poll reads at most
_MOST: Final = 2**53

Value = float | int | None


@dataclass(frozen=True)
class Command:
    """One command: its number in the run, name, value (lr: float; budget: int or None) and wall time of sending (s)."""

    seq: int
    name: str
    value: Value = None
    time: float = 0.0


@dataclass(frozen=True)
class Rejected:
    """A line of control.jsonl (1-based; 0 = the file itself) that is no command, and why."""

    line: int
    why: str


@dataclass(frozen=True)
class Ack:
    """What a run did with a command. As an event: `events.emit(ACK, **ack.facts())`."""

    seq: int
    command: str
    value: Value = None
    ok: bool = True
    why: str = ""

    def facts(self) -> dict[str, Any]:
        """The data of the event."""
        return asdict(self)


def checked(name: str, value: Any = None) -> Value:
    """The value that a command carries. Raises ConfigError (unknown name, value of the wrong kind) with what to write.

    lr: a finite number above 0. budget: an integer from 0 up, or None. All others: None.
    """
    if name not in COMMANDS:
        raise unknown("command", str(name), COMMANDS)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "lr":
        if not number or not abs(value) < _MOST or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"lr = {value!r}; write a number above 0, such as 3e-4")
        return float(value)
    if name == "budget":
        if value is not None and (not number or not 0 <= value < _MOST or value != int(value)):
            raise ConfigError(f"budget = {value!r}; write a whole number of tokens from 0 up, or none for no cap")
        return None if value is None else int(value)
    if value is not None:
        raise ConfigError(f"{name} takes no value, {value!r} was given; write {name} alone")
    return None


def send(run: Path, name: str, value: Any = None) -> int:
    """Append a command for the run in folder `run`; returns its number. Raises ConfigError as `checked`."""
    value = checked(name, value)
    if not run.is_dir():
        raise ConfigError(f"no run folder at {str(run)!r}")
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(run / FILE, flags, 0o644)
        try:
            with locked(handle):
                return _append(handle, name, value)
        finally:
            os.close(handle)
    except OSError as error:
        raise disk_error(error, f"cannot send {name} to {str(run)!r}") from error


def _append(handle: int, name: str, value: Value) -> int:
    size = os.fstat(handle).st_size
    with os.fdopen(os.dup(handle), "rb") as file:
        file.seek(0)
        there = file.read()
    seq = 1 + max((c.seq for c in map(_parse, there.split(b"\n")) if isinstance(c, Command)), default=0)
    row = {"seq": seq, "time": time.time(), "command": name, "value": value}
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    if there and not there.endswith(b"\n"):  # a sender died in its line
        line = b"\n" + line
    try:
        write_all(handle, line)
    except OSError:
        os.ftruncate(handle, size)
        raise
    return seq


def _parse(line: bytes) -> Command | str:
    """A line as a command, or why it is none."""
    if len(line) > _LONGEST:
        return f"the line has more than {_LONGEST} bytes"
    try:
        row = json.loads(line.decode("utf-8"))
        seq, name, sent = row["seq"], row["command"], row.get("time", 0.0)
        if type(seq) is not int or not 0 < seq < _MOST:
            return f"seq = {seq!r}; a number from 1 up is needed"
        if isinstance(sent, bool) or not isinstance(sent, (int, float)) or not abs(sent) < _MOST:
            return f"time = {sent!r} is no time"
        return Command(seq, str(name), checked(name, row.get("value")), float(sent))
    except ConfigError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 'no command; a line is {"seq": 1, "time": 0, "command": "pause", "value": null}'


class ControlReader:
    """The receiving side: `poll` gives what arrived since the last call and never raises.

    Commands from before this reader are not given unless `from_start`. A line counts once it ends with a newline.
    """

    def __init__(self, run: Path, from_start: bool = False) -> None:
        self.path = run / FILE
        self._offset, self._inode, self._lines, self._part, self._skip = 0, 0, 0, b"", False
        self._seen: set[tuple[int, float]] = set()
        self._troubles: list[Rejected] = []  # with the file itself
        self._trouble = ""
        if not from_start:
            while data := self._block():
                self._take(data)
            self._skip, self._part = bool(self._part) or self._skip, b""  # the rest of a begun line is old as well

    def poll(self) -> list[Command | Rejected]:
        """New commands in order, and each line that is none, once."""
        return self._take(self._block())

    def _block(self) -> bytes:
        """The next bytes of the file; b"" when there are none."""
        try:
            with self.path.open("rb") as file:
                now = os.fstat(file.fileno())
                if self._inode not in (0, now.st_ino) or now.st_size < self._offset:
                    self._offset, self._lines, self._part, self._skip = 0, 0, b"", False
                    self._troubles.append(Rejected(0, f"{FILE} was replaced or cut; reading it from its start"))
                self._inode = now.st_ino
                file.seek(self._offset)
                data = file.read(_BLOCK)
        except FileNotFoundError:
            return b""
        except OSError as error:
            if str(error) != self._trouble:  # once, not at every step
                self._troubles.append(Rejected(0, f"{FILE} cannot be read: {error}"))
            self._trouble = str(error)
            return b""
        self._offset += len(data)
        return data

    def _take(self, data: bytes) -> list[Command | Rejected]:
        told: list[Command | Rejected] = list(self._troubles)
        self._troubles.clear()
        *lines, rest = (self._part + data).split(b"\n")
        for line in lines:
            self._lines += 1
            skip, self._skip = self._skip, False
            if skip or not line.strip():
                continue
            found = _parse(line)
            if isinstance(found, str):
                told.append(Rejected(self._lines, found))
            elif (found.seq, found.time) in self._seen:  # the file was cut and is read again
                told.append(Rejected(self._lines, f"command {found.seq} was given already"))
            else:
                self._seen.add((found.seq, found.time))
                told.append(found)
        if len(rest) > _LONGEST and not self._skip:
            told.append(Rejected(self._lines + 1, f"the line has more than {_LONGEST} bytes"))
            self._skip = True
        self._part = b"" if self._skip else rest
        return told


def wait_ack(run: Path, seq: int, timeout: float = 10.0, since: float = 0.0) -> Ack | None:
    """Wait at most `timeout` s for the answer to command `seq` in events.jsonl; None when none came.

    since: wall time (s) before the command was sent; older answers belong to an earlier control.jsonl.
    """
    end, path, part = time.monotonic() + timeout, run / EVENTS, b""
    offset = max(0, path.stat().st_size - _BLOCK) if path.is_file() else 0
    while True:
        data, offset = _after(path, offset)
        *lines, part = (part + data).split(b"\n")
        for line in lines:
            ack = _as_ack(line, since)
            if ack is not None and ack.seq == seq:
                return ack
        if not data:
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)


def _after(path: Path, offset: int) -> tuple[bytes, int]:
    """(bytes from `offset` on, offset behind them); a file that a restarted run has cut is taken up at its end."""
    try:
        with path.open("rb") as file:
            offset = min(offset, os.fstat(file.fileno()).st_size)
            file.seek(offset)
            data = file.read(_BLOCK)
    except OSError:
        return b"", offset
    return data, offset + len(data)


def _as_ack(line: bytes, since: float) -> Ack | None:
    if ACK.encode() not in line:
        return None
    try:
        row = json.loads(line)
        if row["event"] != ACK or row["time"] < since:
            return None
        return Ack(int(row["seq"]), str(row["command"]), row.get("value"), row["ok"] is True, str(row.get("why") or ""))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
