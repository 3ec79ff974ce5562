"""The command line as people type it, wrong words included. In one process, so that torch is loaded once."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gnomon.interfaces import cli


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_help_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from gnomon.interfaces.cli import run\n"
        "run(['--help'])\n"
        "print(time.perf_counter() - t, 'torch' in sys.modules, file=sys.stderr)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 10, "a loaded machine may be slow, but not that slow"
    assert "evaluate" in done.stdout
    assert done.stderr.split()[-1] == "False", "the help text must not import torch"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["asq", "hi"], "ask"),
        (["evaluate", "--tusks", "all"], "--tasks"),
        (["evaluate", "--tasks", "chian"], "chain"),
        (["evaluate", "--plan", "stepz"], "steps"),
        (["evaluate", "--split", "tset"], "test"),
        (["ask", "hi", "--model", "nanno"], "nano"),
        (["train", "pretrain", "--optm.lr", "3"], "--optim.lr"),
        (["train", "pretrain", "--model.preset", "mikro"], "micro"),
        (["train", "metacog", "--lable-n", "30"], "--label-n"),
        (["data", "prepare", "smollm"], "smollm2"),
    ],
)
def test_typing_errors_suggest_the_nearest_name(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    code, out, err = call(capsys, *words)
    assert code == cli.USER_ERROR
    assert expected in err
    assert "Traceback" not in err
    assert out == ""


def test_bad_values_are_refused_with_what_to_write(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, expected in (
        (["ask", "Compute 3 + 4.", "--budget", "-3"], "negative"),
        (["ask", "Compute 3 + 4.", "--budget", "nune"], "none"),
        (["ask", "", "--model", "nano"], "empty"),
        (["evaluate", "--n", "0"], "at least one"),
        (["evaluate", "--levels", "9"], "1 to 5"),
        (["ask", "hi", "--model", str(tmp_path / "nowhere")], "no model folder"),
        (["ask", "Compute 3 + 4.", "--plan", "steps", "--budget", "9999"], "at most"),
        (["calibrate", "--model", str(tmp_path)], "train metacog"),
        (["report", "nothing", "--root", str(tmp_path)], "no run"),
        (["validate"], "--model"),
        (["validate", "--model", "nano", "--stop", "</halt>"], "</halt>"),
    ):
        code, _, err = call(capsys, *words)
        assert code == cli.USER_ERROR, words
        assert expected in err, (words, err)


def test_a_half_there_folder_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = call(capsys, "ask", "hi", "--model", str(tmp_path))
    assert code == cli.USER_ERROR
    assert "missing" in err


def test_ask_prints_the_schema_and_keeps_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "ask", "Compute 34 + 27 - 15.", "--plan", "steps", "--budget", "3", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"plan", "confidence", "budget", "answer_tokens", "stop", "think", "answer"} <= set(facts)
    assert facts["budget"]["used"] <= 3
    assert facts["budget"]["effective"] == 3
    assert set(facts["confidence"]) == {"before", "after", "calibrated"}


def test_evaluate_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--tasks", "boolean,sort", "--n", "8", "--plan", "direct", "--budget", "none", "--json"]
    code, out, _ = call(capsys, *words)
    facts = json.loads(out)
    assert code == 0
    assert facts["n"] == 8
    assert set(facts["by_task"]) == {"boolean", "sort"}
    assert all({"accuracy", "n"} <= set(v) for v in facts["by_task"].values())
    assert facts["think_tokens_mean"] >= 0


def test_chat_answers_and_survives_wrong_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "/examples\n/budgt 3\n/plan steps\n/budget 4\nSort 34 12 78.\n<think> </think>\n/quit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = call(capsys, "chat")
    assert code == 0
    assert "did you mean '/budget'" in err
    assert "Knights tell the truth" in err
    assert len(out.splitlines()) == 2, "one line per answer, nothing after /quit"


def test_validate_names_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "validate", "--model", "nano", "--json")
    assert code == 0
    assert {"tags", "row alone = row in batch"} <= {c["check"] for c in json.loads(out)["checks"]}


def test_pretrain_runs_resumes_and_refuses_to_overwrite(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    shape = ["--model.preset", "micro", "--model.channels", "32", "--model.layers", "1", "--model.heads", "2"]
    common = [*shape, "--run", run, "--rows", "2", "--corpus.records", "2000", "--tasks", "sort", "--levels", "1"]
    code, out, _ = call(capsys, "train", "pretrain", *common, "--steps", "3", "--save-every", "2", "--json")
    assert code == 0
    assert json.loads(out)["step"] == 3
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all("train/loss" in r for r in rows)
    code, _, err = call(capsys, "train", "pretrain", *common, "--steps", "5")
    assert code == cli.USER_ERROR
    assert "--resume auto" in err
    code, out, err = call(capsys, "train", "pretrain", "--run", run, "--steps", "5", "--resume", "auto", "--json")
    assert code == 0
    assert json.loads(out)["step"] == 5
    assert "steps: 3 -> 5" in err
    code, _, err = call(capsys, "report", run)
    assert code == 0
    assert (Path(run) / "report.html").is_file()


def test_data_prepare_and_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "data")
    words = ["data", "prepare", "--out", out, "--records", "200", "--tasks", "sort", "--workers", "1"]
    assert call(capsys, *words)[0] == 0
    code, shown, _ = call(capsys, "data", "inspect", out, "--n", "2")
    assert code == 0
    assert "Sort" in shown
    assert "trained" in shown
    code, _, err = call(capsys, *words)
    assert code == cli.USER_ERROR
    assert "already holds" in err
