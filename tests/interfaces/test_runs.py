"""What runs leave behind and how they are found again: interrupted ones, died ones, the newest of a preset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.base.errors import ConfigError
from gnomon.base.runs import create_run
from gnomon.interfaces import chat, cli, console
from gnomon.interfaces.commands import train
from gnomon.recipes.metacog import MetacogRunConfig
from gnomon.recipes.pretrain_config import resolve, resume_point


def test_a_run_without_a_checkpoint_goes_on_with_its_own_values(tmp_path: Path) -> None:
    config, _ = resolve(None, {"steps": 77, "model.preset": "nano", "corpus.tasks": "sort"})
    run = create_run("pretrain", config, root=tmp_path)
    run.close()
    place, found = resume_point("auto", run.folder)
    again, _ = resolve(None, {"steps": 78}, found.values())
    assert (place, found.path) == (run.folder, None)
    assert (again.steps, again.model, again.corpus.tasks) == (78, config.model, ("sort",))


def test_resume_auto_takes_the_newest_run_of_the_preset(tmp_path: Path) -> None:
    folders = {}
    for age, preset in enumerate(("nano", "micro")):
        run = create_run("pretrain", resolve(None, {"model.preset": preset})[0], root=tmp_path)
        run.close()
        os.utime(run.folder / "resolved.yaml", (1000 + age, 1000 + age))
        folders[preset] = run.folder
    assert train._latest(tmp_path, None) == folders["micro"]
    assert train._latest(tmp_path, "nano") == folders["nano"]
    assert train._latest(tmp_path, "small") is None
    assert train._latest(tmp_path / "none", None) is None


def test_runs_tells_a_died_run_from_a_running_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, pid in (("alive", os.getpid()), ("dead", 2**22 + 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(
            json.dumps({"state": "running", "step": 3, "total": 9, "pid": pid})
        )
    assert cli.run(["runs", "--root", str(tmp_path), "--json"]) == 0
    states = {r["run"]: r["state"] for r in json.loads(capsys.readouterr().out)["runs"]}
    assert states == {"alive": "running", "dead": "died"}


def test_metacog_takes_its_base_from_the_file_unless_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "c.yaml"
    file.write_text(f"base: {other}\ntasks: sort\n")
    for words, base in (([], str(other)), (["--base", "nano"], "nano")):
        assert cli.run(["train", "metacog", "--config", str(file), "--dry-run", "--json", *words]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["base"], facts["tasks"]) == (base, "sort")
    assert MetacogRunConfig().base == "nano"


def test_metacog_names_its_device_and_one_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("device: auto\n")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    for words, device in (([], "cpu"), (["--device", "cpu"], "cpu"), (["--device", "auto"], there),
                          (["--config", str(file)], there)):  # fmt: skip
        assert cli.run(["train", "metacog", "--dry-run", "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["device"] == device, "no auto is left in what is resolved"
    for name in ("cuda:97", "nose"):
        assert cli.run(["train", "metacog", "--device", name, "--runs", str(tmp_path / "runs")]) == cli.USER_ERROR
        said = capsys.readouterr().err
        assert f"there is no device {name!r} here" in said and 'write "cpu", "auto"' in said
        assert not (tmp_path / "runs").exists()
        assert cli.run(["ask", "Compute 3 + 4.", "--device", name]) == cli.USER_ERROR
        assert f"there is no device {name!r} here" in capsys.readouterr().err


def test_interruption_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gnomon.recipes.pretrain_run.prepare", interrupted)
    monkeypatch.setattr(console, "_resume", "")
    run = tmp_path / "run"
    assert cli.run(["train", "pretrain", "--run", str(run), "--steps", "2"]) == cli.INTERRUPTED
    shown = capsys.readouterr()
    assert f"gnomon train pretrain --run {run} --resume auto" in shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def facts(calibrated: bool, source: str = "predicted", stop: str = "natural") -> dict[str, Any]:
    sure = {"before": 0.8 if calibrated else None, "after": 0.9 if calibrated else None, "calibrated": calibrated}
    budget = {"used": 23, "predicted": 25.4, "effective": 31, "source": source}
    return {"plan": "steps", "confidence": sure, "budget": budget, "stop": stop}


def test_the_line_under_an_answer_says_why_confidence_is_unknown() -> None:
    assert "thought 23 tokens (steps), expected 25, cap 31" in chat.summary(facts(True))
    assert "0.80 before, 0.90 after" in chat.summary(facts(True))
    assert "outside what the card was fitted for" in chat.summary(facts(False))
    assert "of your own" in chat.summary(facts(False, source="requested"))
    assert "of your own" in chat.summary(facts(False), own=True)
    assert "no metacognitive layer" in chat.summary(facts(False), known=False)
    assert "closed: hard" in chat.summary(facts(True, stop="hard"))


def test_every_value_of_a_resolved_run_is_written_out() -> None:
    config, _ = resolve(None, {"model.preset": "micro", "model.layers": 2})
    assert None not in config.model.model_dump().values()
    assert (config.model.layers, config.model.channels) == (2, 128)
    with pytest.raises(ConfigError, match="below corpus.max_tokens"):
        resolve(None, {"model.context": 128})
