"""The whole metacognitive recipe in small: labels, heads, card, evaluation, sweep, claims, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests import own

from gnomon.base.errors import DataError
from gnomon.base.runs import create_run
from gnomon.reasoner import Reasoner
from gnomon.recipes import claims, demo, draws, metacog
from gnomon.recipes.metacog import MetacogRunConfig, draw_labels, train
from gnomon.training.heads_fit import HeadsConfig
from gnomon.training.labels import LabelSet


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(own.taught(steps=80), tmp_path_factory.mktemp("base"))


def config(base: Path, **more: object) -> MetacogRunConfig:
    sizes = {"label_n": 26, "calibration_n": 26, "val_n": 26, "test_n": 26}
    body = {"base": str(base), "tasks": "boolean", "levels": (1, 2), "samples": 1, "stream": "mini", **sizes}
    return MetacogRunConfig.model_validate({**body, "heads": HeadsConfig(steps=30, proj_dim=8, width=16), **more})


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    return demo.run(config(base), tmp_path_factory.mktemp("runs"), lambda _: None)


def test_the_run_folder_holds_everything(made: demo.Demo, base: Path) -> None:
    names = {p.name for p in made.folder.iterdir()}
    assert {"model", "labels", "results.json", "report.html", "claims.json", "sweep.csv", "resolved.yaml"} <= names
    results = json.loads((made.folder / "results.json").read_text())
    assert set(results) == {"summary", "sweep", "heads", "card", "phases", "seconds"}
    assert results["summary"]["n"] == 26 and len(results["sweep"]["points"]) == 32
    assert json.loads((made.folder / "status.json").read_text())["state"] == "done"
    page = made.page.read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "What this run shows" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_claims_are_numbers_of_this_run(made: demo.Demo) -> None:
    body = json.loads((made.folder / "claims.json").read_text())
    assert body["columns"] == list(claims.COLUMNS) and body["rows"] == [list(r) for r in made.rows]
    table = {r[0]: r for r in made.rows}
    assert table["think tokens beyond the cap"][1] == "0"
    accuracy = json.loads((made.folder / "results.json").read_text())["summary"]["accuracy"]
    assert table["accuracy, predicted plan and budget"][1] == claims.show(accuracy)
    assert "accuracy lost against the best fixed strategy per family" in table
    assert all(r[4] for r in made.rows)


def test_the_saved_model_decides_as_the_trained_one(made: demo.Demo, base: Path) -> None:
    again = Reasoner.load(made.folder / "model")
    trained = made.outcome.trained.reasoner
    assert again.decider is not None and again.decider.card == trained.decider.card  # type: ignore[union-attr]
    assert again.best_plan == trained.best_plan and set(again.best_plan) == {"boolean"}
    prompt = "Work out (true and false) or true."
    assert again.ask(prompt).report() == trained.ask(prompt).report()
    assert not (made.folder / "model" / "model.safetensors").exists()  # the base stays where it is


def test_labels_are_cached_and_used_again(
    made: demo.Demo, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reasoner, cfg = Reasoner.load(base), config(base)
    assert len(list((made.folder / "labels").iterdir())) == 3  # train, val, calibration
    calls: list[int] = []
    plain = draws.label
    monkeypatch.setattr(draws, "label", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    found = draw_labels(reasoner, cfg, "train", cfg.label_n, cfg.samples, made.folder / "labels")
    assert calls == [] and len(found.problems) == 26
    for change in ({"stream": "other"}, {"levels": (1,)}, {"max_think": 9}):
        other = cfg.model_copy(update={**change, "label_n": 2})
        draw_labels(reasoner, other, "train", 2, 0, tmp_path)
    assert calls == [1, 1, 1] and len(list(tmp_path.iterdir())) == 3


def test_given_labels_are_taken_and_those_of_another_base_refused(made: demo.Demo, base: Path, tmp_path: Path) -> None:
    folder = next(p for p in (made.folder / "labels").iterdir() if LabelSet.load(p).meta["split"] == "train")
    cfg = config(base, labels=str(folder))
    given = train(Reasoner.load(base), cfg, made.folder / "labels")
    assert given.labels.meta["split"] == "train"
    other = own.save(own.decoder("stranger", streams=1), tmp_path / "other")
    with pytest.raises(DataError, match="made by another base"):
        train(Reasoner.load(other), config(other, labels=str(folder)), tmp_path)
    with pytest.raises(DataError, match="no label set in"):
        train(Reasoner.load(base), config(base, labels=str(tmp_path / "gone")), tmp_path)


def test_an_interrupted_run_says_so_and_keeps_its_labels(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metacog, "fit_heads", stop)
    run = create_run("mini", config(base), root=tmp_path)
    with pytest.raises(KeyboardInterrupt), run:
        metacog.run_metacog(config(base), run)
    assert json.loads((run.folder / "status.json").read_text())["state"] == "stopped"
    assert LabelSet.load(next((run.folder / "labels").iterdir())).problems


def test_trial_answers_make_the_running_confidence_that_of_closing(
    made: demo.Demo, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train and calibration draws, kept and used again; without trial_n nothing changes."""
    assert not made.outcome.trained.reasoner.decider.heads.config.closing  # type: ignore[union-attr]
    cfg = config(base, trial_n=12, tasks="boolean,lookup")
    found = train(Reasoner.load(base), cfg, tmp_path / "labels").reasoner
    assert found.decider is not None and found.decider.heads.config.closing
    drawn = sorted((p for p in (tmp_path / "labels").iterdir()), key=lambda p: p.name)
    assert len(drawn) == 5, "labels of three splits, trial answers of two"
    found.save_layer(tmp_path / "model")
    assert Reasoner.load(tmp_path / "model").decider.heads.config.closing  # type: ignore[union-attr]
    monkeypatch.setattr(draws, "label_trials", lambda *_, **__: pytest.fail("made again"))
    train(Reasoner.load(base), cfg, tmp_path / "labels")
