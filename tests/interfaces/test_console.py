"""What people read during a run."""

from __future__ import annotations

import pytest

from gnomon.base.telemetry import Telemetry
from gnomon.interfaces import console


def sample(number: int, **changes: object) -> dict[str, object]:
    facts = {"task": "knights", "level": 2, "prompt": f"Puzzle {number}\nWho?", "think": "A lies\x1b[2J", "used": 7}
    return {**facts, "answer": "B", "gold": "B", "correct": True, **changes}


def test_at_most_three_puzzles_of_a_check_are_told_with_everything(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(console.Narrator())
    for step in (100, 200):
        telemetry.emit("eval/logic", step=step, correct=1, n=8)
        for number in range(5):
            telemetry.emit(
                "eval/sample", step=step, sample=sample(number, correct=number == 0, answer="" if number else "B")
            )
    shown = capsys.readouterr().err
    assert shown.count("Puzzle") == 6
    assert "[knights 2] Puzzle 0 / Who?\n    thinks (7 tokens): A lies?[2J\n    answers B, gold B: right\n" in shown
    assert "answers (nothing), gold B: wrong" in shown
    assert "\x1b" not in shown


def test_right_and_wrong_have_colours() -> None:
    assert "\x1b[32mright\x1b[0m" in console.puzzle(sample(1))
    assert "\x1b[31mwrong\x1b[0m" in console.puzzle(sample(1, correct=False))
    assert len(console.puzzle(sample(1, think="x" * 5000))) < 700


def test_warnings_are_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(console.Narrator())
    telemetry.emit("train/skipped", level="warning", step=3, why="loss is nan")
    telemetry.emit("checkpoint/skipped", level="warning", name="checkpoint-5", why="torn")
    telemetry.emit("tracker/failed", level="warning", tracker="wandb", why="no room", rows_dropped=3)
    telemetry.emit("checkpoint/saved", other="facts of a later version")
    assert capsys.readouterr().err.splitlines() == [
        "warning: train/skipped step=3 why=loss is nan",
        "warning: checkpoint-5 cannot be used: torn",
        "warning: tracker wandb is given up (no room, 3 rows dropped); the run and metrics.jsonl go on",
        "checkpoint/saved other=facts of a later version",
    ]


def test_a_stage_that_is_through_says_so_before_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Stages() as stages:
        count = stages("corpus", 4)
        count(2)
        count(2)
        console.say("data: ready")
        stages("train", 2)(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["corpus: 4/4", "data: ready", "train: 1/2"]
