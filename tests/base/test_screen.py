"""The console: what a terminal shows, what a log holds, and that a lost terminal stops nothing."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

from gnomon.base.config import Config
from gnomon.base.runs import create_run
from gnomon.base.screen import Screen, harmless, paint, plain, screen
from gnomon.base.telemetry import Progress, live_note, span


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Small(Config):
    lr: float = 0.5


def test_lines_stand_above_the_live_line_and_the_log_has_no_codes(tmp_path: Path) -> None:
    shown = Terminal()
    one = Screen(shown)
    one.attach(tmp_path / "stdout.log")
    one.live("train 1/9")
    one.line(paint("right", "green"))
    one.live("train 2/9")
    one.live("")
    one.detach(tmp_path / "stdout.log")
    one.line("not logged")
    assert shown.getvalue() == (
        "\r\x1b[Ktrain 1/9\r\x1b[K\x1b[32mright\x1b[0m\ntrain 1/9\r\x1b[Ktrain 2/9\r\x1b[Knot logged\n"
    )
    assert (tmp_path / "stdout.log").read_text() == "right\n"


def test_without_a_terminal_everything_is_plain() -> None:
    shown = io.StringIO()
    one = Screen(shown)
    one.live("train 1/9")
    one.line(paint("right", "green"))
    assert shown.getvalue() == "right\n"


def test_a_terminal_that_is_gone_is_no_error(tmp_path: Path) -> None:
    class Gone(Terminal):
        def write(self, _: str) -> int:
            raise OSError(5, "Input/output error")

    for stream in (Gone(), Terminal()):
        if not isinstance(stream, Gone):
            stream.close()
        one = Screen(stream)
        one.attach(tmp_path / "stdout.log")
        one.line("still here")
        one.live("x")
        one.detach(tmp_path / "stdout.log")
    assert (tmp_path / "stdout.log").read_text() == "still here\n" * 2


def test_text_of_others_cannot_act_on_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\rc\x00\ud800\td\n") == "a?[2Jb?c??\td\n"
    assert plain(paint("x", "red") + "\x1b[2K\x1b[?25h") == "x"


def test_what_is_said_while_a_run_is_open_is_in_its_log(tmp_path: Path) -> None:
    with create_run("demo", Small(), tmp_path) as run:
        screen().line(paint("hello", "cyan"))
        with Progress("work", total=2) as bar:
            bar.advance(2, "half")
    screen().line("after")
    text = (run.folder / "stdout.log").read_text()
    assert text.splitlines() == ["hello", "work: 2/2 in 0 s half done"]


def test_the_live_line_on_a_real_terminal() -> None:
    code = (
        "import time; from gnomon.base.telemetry import Progress\n"
        "with Progress('train', total=4) as bar:\n"
        "    for i in range(4): time.sleep(0.12); bar.advance(1, 'loss 1.500')"
    )
    main, side = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(main, 4096):
                seen.append(data)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    env = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    env.pop("NO_COLOR", None)
    done = subprocess.run([sys.executable, "-c", code], stderr=side, env=env, timeout=60)
    os.close(side)
    reader.join(5)
    os.close(main)
    text = b"".join(seen).decode()
    assert done.returncode == 0
    assert "\x1b[32m" in text
    lines = plain(text).split("\r")
    assert any("train 2/4" in line and "50%" in line and "eta" in line and "loss 1.500" in line for line in lines), (
        lines
    )
    assert lines[-2].startswith("train: 4/4")
    assert lines[-2].endswith("loss 1.500 done")


def test_numbers_of_the_live_line() -> None:
    row = {"train/loss": 2.31256, "train/tok_per_sec": 5120.4, "data/wait_share": 0.004, "train/skipped": 0}
    assert live_note(row) == "loss 2.313  5,120 tok/s  data wait 0.4%"
    assert live_note({"train/loss": None, "train/skipped": 2}) == "skipped 2"
    assert [span(s) for s in (3.2, 307, 7000, 90000)] == ["3 s", "5:07 min", "1:57 h", "25:00 h"]
