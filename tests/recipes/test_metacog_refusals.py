"""What `train metacog` refuses before it pays for labels, and a closing layer that is calibrated again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import own
from tests.interfaces.test_cli import call
from tests.recipes.test_metacog import config

from gnomon.base.errors import ConfigError, DataError
from gnomon.reasoner import Reasoner
from gnomon.recipes import draws, metacog
from gnomon.recipes.metacog import MetacogRunConfig, draw_labels, draw_trials, recalibrate, train
from gnomon.training import rollout
from gnomon.training.rollout import label_trials


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(own.taught(steps=80), tmp_path_factory.mktemp("base"))


@pytest.fixture
def unpaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be labelled."""
    for name in ("label", "label_trials"):
        monkeypatch.setattr(draws, name, lambda *_, **__: pytest.fail("it was labelled first"))


def test_labels_of_other_strategies_are_refused_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasoner, two = Reasoner.load(base), config(base, strategies=("direct", "steps"))
    draw_labels(reasoner, two, "train", 26, 1, tmp_path)
    (folder,) = tmp_path.iterdir()
    monkeypatch.setattr(draws, "label", lambda *_, **__: pytest.fail("it was labelled first"))
    told = r"are of direct,steps, this run is of direct,.*; write --strategies direct,steps$"
    for wrong in (None, ("steps", "direct")):
        with pytest.raises(DataError, match=told if wrong is None else "this run is of steps,direct"):
            train(reasoner, config(base, labels=str(folder), strategies=wrong), tmp_path / "cache")


@pytest.mark.usefixtures("unpaid")
@pytest.mark.parametrize("split", ["train", "val", "calibration", "test"])
def test_a_file_with_too_few_problems_of_a_split_is_refused_at_once(base: Path, tmp_path: Path, split: str) -> None:
    path = tmp_path / "sums.jsonl"
    rows = ({"prompt": f"Compute {i} + 1.", "answer": str(i + 1), "verifier": "integer"} for i in range(2000))
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    sizes = {"label_n": 20, "val_n": 10, "calibration_n": 20, "test_n": 10}
    key = "label_n" if split == "train" else f"{split}_n"
    cfg = config(base, **{"tasks": str(path), **sizes, key: 1900})
    with pytest.raises(ConfigError, match=rf"has \d+ distinct {split} problems .* n = 1900 asks for"):
        train(Reasoner.load(base), cfg, tmp_path)


@pytest.mark.usefixtures("unpaid")
def test_rounds_and_trials_count_among_the_problems_that_are_needed(base: Path, tmp_path: Path) -> None:
    reasoner = Reasoner.load(base)
    sizes: dict[str, Any]
    for sizes in ({"trial_n": 10**5}, {"phases": "AB", "b": {"problems": 10**5}}):
        with pytest.raises(ConfigError, match="n = 100000 asks for"):
            train(reasoner, config(base, **sizes), tmp_path)


@pytest.mark.usefixtures("unpaid")
def test_trial_answers_of_a_run_that_does_not_think_are_refused_at_once(base: Path, tmp_path: Path) -> None:
    cfg = config(base, strategies=("direct",), trial_n=20)
    with pytest.raises(ConfigError, match="direct is the only strategy and does not think"):
        train(Reasoner.load(base), cfg, tmp_path)


def test_a_closing_layer_with_fewer_plans_is_calibrated_again(base: Path, tmp_path: Path) -> None:
    cfg = config(base, strategies=("direct", "steps"), trial_n=12)
    found = train(Reasoner.load(base), cfg, tmp_path).reasoner
    assert found.decider is not None and found.decider.heads.config.plans == ("direct", "steps")
    again = MetacogRunConfig(base=str(base), tasks="boolean", calibration_n=26, levels=(1, 2))
    card, report = recalibrate(found, again)
    assert card.plans == ("direct", "steps")
    assert report["running"]["n_closing"] > 0 and isinstance(report["running"]["missing"], list)


def test_stopped_trial_answers_go_on_with_the_parts_that_they_have(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts, one of which is left to do; what comes of it is what one go gives."""
    reasoner, cfg = Reasoner.load(base), config(base)
    monkeypatch.setattr(rollout, "_TRIAL_CHUNK", 2)
    whole = draw_trials(reasoner, cfg, "train", 6, None)
    plain, made = rollout.trial_answers, []

    def third(*args: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(rollout, "trial_answers", third)
    with pytest.raises(KeyboardInterrupt):
        draw_trials(reasoner, cfg, "train", 6, tmp_path)
    found = draw_trials(reasoner, cfg, "train", 6, tmp_path)
    assert len(made) == 4, "two parts were kept"
    again = draw_trials(reasoner, cfg, "train", 6, tmp_path)
    assert len(made) == 4 and [p.name for p in next(tmp_path.iterdir()).iterdir() if p.is_dir()] == []
    for name in ("plans", "problems", "used", "right", "problem", "plan", "total", "final"):
        values = [getattr(x, name) for x in (whole, found, again)]
        assert all(list(v) == list(values[0]) and type(v) is type(values[0]) for v in values), name
    assert whole.taps.tobytes() == found.taps.tobytes() == again.taps.tobytes() and whole.right.dtype == bool
    monkeypatch.setattr(rollout, "_TRIAL_CHUNK", 256)
    assert list(label_trials(reasoner, metacog.problems("boolean", "train", "mini", 6, (1, 2))).used) == list(
        whole.used
    )


def test_a_part_without_boundaries_is_kept_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of problems whose thoughts have one node only: empty, and not drawn again."""
    monkeypatch.setattr(rollout, "_TRIAL_CHUNK", 1)
    reasoner, items = Reasoner.load(base), metacog.problems("boolean", "train", "mini", 4, (1, 2))
    with pytest.raises(DataError, match="no place for a trial answer"):
        label_trials(reasoner, items, strategies=("direct",), keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(rollout, "run", lambda *_, **__: pytest.fail("drawn again"))
    with pytest.raises(DataError, match="no place for a trial answer"):
        label_trials(reasoner, items, strategies=("direct",), keep=tmp_path)


def test_the_calibrate_command_says_what_it_could_not_calibrate(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Reasoner.load(base), config(base, trial_n=12), tmp_path / "cache").reasoner.save_layer(tmp_path / "model")
    words = ("--model", str(tmp_path / "model"), "--tasks", "boolean")
    code, out, err = call(capsys, "calibrate", *words, "--n", "20", "--levels", "1")
    assert code == 0 and "not calibrated: " in out + err and "of 20 right or wrong trial answers in a fold" in out + err
    code, _, err = call(capsys, "evaluate", *words, "--n", "4", "--rules", "sure")
    assert code != 0 and "too few trial answers were there to calibrate it: run `gnomon calibrate" in err
    assert "baselines" not in err
