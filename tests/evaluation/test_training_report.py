"""The report of a training run: what is in it comes from the folder, undone rows and torn lines are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gnomon.base.checkpoint import publish
from gnomon.base.config import Config
from gnomon.base.errors import DataError
from gnomon.base.runs import Run, create_run
from gnomon.evaluation import plots
from gnomon.evaluation.report import write_report
from gnomon.evaluation.training_report import by_step, thinned, training_report


class Small(Config):
    lr: float = 0.5


def trained(root: Path, steps: int = 60) -> Run:
    run = create_run("pretrain", Small(lr=0.25), root, {"lr": "override"}, seed=3)
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"tokens": 2048 * step, "train/loss": 5 / step, "train/grad_norm": 1.0 + step % 3}
        row |= {"train/tok_per_sec": 5000.0, "data/wait_share": 0.01, "train/skipped": step // 50, "train/lr": 0.01}
        if step % 20 == 0:
            row["eval/logic_accuracy"] = step / 100
            puzzle = {"task": "knights", "level": 2, "prompt": f"<b>Who?</b> {step}", "think": "S1<-", "used": 9}
            run.sample(step, [{**puzzle, "answer": "A", "gold": "B", "correct": False}] * 3)
        run.row(step, **row)
    with publish(run.checkpoints, 50) as folder:
        (folder / "weights.bin").write_bytes(bytes(1000))
    run.events.emit("checkpoint/saved", step=50, name="checkpoint-50")
    run.events.emit("eval/sample", step=50, sample={"prompt": "not in the table of events"})
    run.events.emit("train/rolled_back", level="warning", step=55, why="loss was not finite", to_step=50)
    run.events.emit("control/ack", step=58, seq=1, command="lr", value=0.1, ok=True, why="")
    run.status("running", step=steps, total=100)
    run.close()
    return run


def test_the_page_shows_curves_events_samples_and_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = trained(tmp_path)
    data = training_report(run.folder)
    assert [(m[0], m[2]) for m in data.marks] == [(50, "saved"), (55, "rolled back"), (58, "command")]
    mean = sum(5 / step for step in range(11, 61)) / 50
    assert {label: value for value, label in data.tiles} == {
        "state": "running", "steps": "60 of 100", "loss, mean of the last 50": f"{mean:.3f}", "tokens": "0.12 M",
        "tokens a second, median": "5,000", "of the time waiting for data": "1.00 %",
        "puzzles right, last of 3 checks": "60 %", "steps skipped": "1",
    }  # fmt: skip
    text = write_report(run.folder, data).read_text(encoding="utf-8")
    for words in (
        "&lt;b&gt;Who?&lt;/b&gt; 60", "&lt;b&gt;Who?&lt;/b&gt; 20", "loss was not finite", "checkpoint-50 (latest)",
        "control/ack", "override", "S1&lt;-",
    ):  # fmt: skip
        assert words in text, words
    assert "not in the table of events" not in text
    assert (run.folder / "plots" / "training_curves.png").is_file()


def test_of_undone_rows_the_later_ones_hold_and_torn_lines_do_not_count(tmp_path: Path) -> None:
    run = trained(tmp_path, 5)
    with (run.folder / "metrics.jsonl").open("a") as file:
        for step in (4, 5, 6):
            file.write(json.dumps({"step": step, "train/loss": 100.0 + step}) + "\n")
        file.write('{"step": 7, "train/lo')
    curves = training_report(run.folder).curves
    assert [(r["step"], r["train/loss"]) for r in curves][2:] == [(3, 5 / 3), (4, 104.0), (5, 105.0), (6, 106.0)]


def test_long_logs_are_thinned_but_keep_every_check() -> None:
    rows = [{"step": s, "train/loss": 1.0, **({"eval/x": 1.0} if s % 1000 == 0 else {})} for s in range(1, 20_001)]
    kept = thinned(rows, 500)
    assert 500 <= len(kept) <= 525
    assert sum("eval/x" in r for r in kept) == 20
    assert kept[-1]["step"] == 20_000
    assert by_step([{"step": 2}, {"step": 1}, {"no": 1}, {"step": 2, "x": 1}]) == [{"step": 1}, {"step": 2, "x": 1}]


def test_nothing_measured_is_an_error_that_says_so(tmp_path: Path) -> None:
    run = create_run("pretrain", Small(), tmp_path)
    run.close()
    with pytest.raises(DataError, match="measured nothing"):
        training_report(run.folder)


def test_what_matters_is_drawn_first_and_nothing_flat_fails() -> None:
    pytest.importorskip("matplotlib")
    names = [f"z/{i}" for i in range(20)] + ["train/loss", "data/wait_share", "train/grad_norm", "tokens"]
    rows = [{"step": s, **dict.fromkeys(names, 0.0)} for s in range(100)]
    figure = plots.training_curves(rows, [(50, 2, "saved")])
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert titles[:3] == ["train/loss", "train/grad_norm", "data/wait_share"]
    assert len(titles) == plots.MOST_CURVES
    assert "tokens" not in titles
