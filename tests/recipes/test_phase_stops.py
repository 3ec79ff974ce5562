"""Phases that are stopped, by Ctrl-C or by a full disk: what was there stays, and the same command goes on from it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import own

from gnomon.base.errors import DataError
from gnomon.interfaces import cli
from gnomon.reasoner import Reasoner
from gnomon.recipes import draws, metacog, phases
from gnomon.recipes.metacog import MetacogRunConfig
from gnomon.training.adapt import AdaptConfig
from gnomon.training.heads_fit import HeadsConfig
from gnomon.training.phase_fit import PhaseConfig

SMALL = PhaseConfig(problems=20, label_n=26, samples=1, steps=3, batch=4, head_batch=8)
SIZES = ["--label-n", "26", "--calibration-n", "26", "--val-n", "26", "--test-n", "26", "--samples", "1"]
TINY = [
    "--tasks", "boolean", "--levels", "1,2", *SIZES, "--heads.steps", "10", "--heads.proj-dim", "8",
    "--heads.width", "16", "--b.problems", "20", "--b.label-n", "26", "--b.samples", "1", "--b.steps", "3",
    "--b.batch", "4", "--b.head-batch", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(own.taught(steps=80), tmp_path_factory.mktemp("base"))


def config(folder: Path) -> MetacogRunConfig:
    return MetacogRunConfig.model_validate(
        {
            "base": str(folder), "tasks": "boolean", "levels": (1, 2), "samples": 1, "stream": "mini-stop",
            "label_n": 26, "calibration_n": 26, "val_n": 26, "test_n": 26, "phases": "ABC", "b": SMALL,
            "heads": HeadsConfig(steps=10, proj_dim=8, width=16),
            "c": SMALL.model_copy(update={"adapt": AdaptConfig(mode="ln"), "rounds": 2, "capped": 0.5}),
        }
    )  # fmt: skip


def weights(reasoner: Reasoner) -> list[torch.Tensor]:
    assert reasoner.decider is not None and reasoner.decider.steerer is not None
    parts = (reasoner.decider.heads, reasoner.decider.steerer, reasoner.backbone.module)  # type: ignore[attr-defined]
    return [p.detach().clone() for part in parts for p in part.parameters()]


def test_a_stopped_run_goes_on_with_the_rollouts_it_has(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    plain_label, plain_collect, plain_fit = draws.label, phases.collect, phases.fit_phase
    monkeypatch.setattr(draws, "label", lambda *a, **k: (made.append(k["seed"]), plain_label(*a, **k))[1])
    monkeypatch.setattr(phases, "collect", lambda *a: (made.append(a[3]), plain_collect(*a))[1])
    whole = metacog.train(Reasoner.load(folder), config(folder), tmp_path / "whole")
    in_one_go = made.copy()
    assert len(in_one_go) == len(set(in_one_go)) + 2, "val and calibration twice, by base and by the steered model"
    made.clear()

    def stopped(*args: Any, **named: Any) -> Any:
        if "/C1/" in named["name"]:
            raise KeyboardInterrupt
        return plain_fit(*args, **named)

    monkeypatch.setattr(phases, "fit_phase", stopped)
    with pytest.raises(KeyboardInterrupt):
        metacog.train(Reasoner.load(folder), config(folder), tmp_path / "labels")
    before = made.copy()
    assert before == in_one_go[: len(before)] and len(before) == len(in_one_go) - 2
    made.clear()
    monkeypatch.setattr(phases, "fit_phase", plain_fit)
    after = metacog.train(Reasoner.load(folder), config(folder), tmp_path / "labels")
    assert made == in_one_go[len(before) :], "nothing is decoded twice"
    pairs = zip(weights(after.reasoner), weights(whole.reasoner), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "and the model is the one of a run that was not stopped"


def test_other_weights_other_rollouts(folder: Path, tmp_path: Path) -> None:
    """Stale rollouts are the classic mistake: the key holds heads, card, steerer and what the base became."""
    from tests.recipes.test_phases import layered

    reasoner = layered(folder)
    draw = phases.Draw("boolean", (1, 2), "stale", None, None, 32, 0, tmp_path)
    first = phases.learnable(reasoner, SMALL, draw, "stale")
    assert phases.learnable(reasoner, SMALL, draw, "stale") == first and len(list(tmp_path.iterdir())) == 1
    assert reasoner.decider is not None
    with torch.no_grad():
        reasoner.decider.heads.plan_head[0].weight += 0.01  # type: ignore[operator, index]
    phases.learnable(reasoner, SMALL, draw, "stale")
    phases.learnable(reasoner, SMALL.model_copy(update={"capped": 0.5}), draw, "stale")
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_rollouts_are_named(folder: Path, tmp_path: Path) -> None:
    from tests.recipes.test_phases import layered

    draw = phases.Draw("boolean", (1, 2), "torn", None, None, 32, 0, tmp_path)
    phases.learnable(layered(folder), SMALL, draw, "torn")
    path = next(tmp_path.iterdir()) / draws.LESSONS_FILE
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match=r"thoughts\.json.* damaged"):
        phases.learnable(layered(folder), SMALL, draw, "torn")


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there_and_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", "metacog", "--base", str(folder), "--run", str(run), "--phases", "AB", *TINY]
    assert cli.run([*words, "--with-sweep", "false"]) == 0
    good = content(run / "model")
    labels = content(run / "labels")
    plain, left = os.fsync, [10**6]

    def full(handle: int) -> None:
        """Some systems tell it only here."""
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    untouched = failed = 0
    for free in range(0, 99, 3):  # writes that still fit
        left[0] = free
        capsys.readouterr()
        code = cli.run([*words, "--with-sweep", "false", "--seed", "1"])
        said = capsys.readouterr().err
        left[0] = 10**6
        assert Reasoner.load(run / "model").decider is not None, "a whole layer, the old one or the new"
        assert not [name for name in content(run) if ".tmp" in name]
        if code == 0:
            break
        assert code == errno.ENOSPC and "No space left on device" in said, said
        assert f"--run {run}" in said and "Traceback" not in said
        failed, untouched = failed + 1, untouched + (content(run / "model") == good)
    assert failed >= 4 and untouched >= 2, (failed, untouched)
    assert labels.items() <= content(run / "labels").items()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly_and_it_goes_on(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "gnomon", "train", "metacog", "--base", str(folder), "--run", str(run)]
    words += ["--phases", "AB", *TINY, "--with-sweep", "false", "--json"]
    slow = [*words[:-1], "--b.steps", "100000", "--json"]
    with subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as going:
        until = time.monotonic() + 60
        while not any((run / "labels").glob("*/thoughts.json")) and time.monotonic() < until:
            assert going.poll() is None, going.communicate()[1]
            time.sleep(0.05)
        time.sleep(0.3)
        going.send_signal(number)
        out, said = going.communicate(timeout=60)
    assert going.returncode == 0, said
    assert json.loads(out) == {"run": str(run), "stopped": True}
    assert "stopped: finished rollouts are kept" in said and f"--run {run}" in said and "Traceback" not in said
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    kept = content(run / "labels")
    assert Reasoner.load(run / "model").decider is not None, "the heads of phase A are there"
    assert cli.run([*words[3:]]) == 0
    after = content(run / "labels")
    assert kept.items() <= after.items() and sum("thoughts.json" in name for name in after) == 1
