"""Layer folders that do not fit or were damaged, as a user meets them: one line that names it, nothing overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gnomon.interfaces import cli
from gnomon.metacognition.calibration import FILE_NAME, Card
from gnomon.metacognition.store import CONFIG_FILE, WEIGHTS_FILE
from gnomon.reasoner import BASE_FILE, shipped

Body = dict[str, Any]


def config(change: Callable[[Body], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        body = json.loads((folder / CONFIG_FILE).read_text())
        change(body)
        (folder / CONFIG_FILE).write_text(json.dumps(body))

    return act


def card(change: Callable[[Body], object], sealed: bool = False) -> Callable[[Path], None]:
    """sealed: with a digest of its own, as a program would write it."""

    def act(folder: Path) -> None:
        path = folder / FILE_NAME
        body = json.loads(path.read_text())
        change(body)
        if sealed:
            body.pop("digest")
            Card.model_validate(body).save(path)
        else:
            path.write_text(json.dumps(body))

    return act


def weights(value: float) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        state = load_file(str(folder / WEIGHTS_FILE))
        name = sorted(state)[-1]
        state[name] = torch.full_like(state[name], value)
        save_file(state, str(folder / WEIGHTS_FILE))

    return act


def torn(folder: Path) -> None:
    (folder / FILE_NAME).write_text((folder / FILE_NAME).read_text()[:500])


def write(path: Path, text: str) -> None:
    path.write_text(text)


def narrow(body: Body) -> None:
    domain = body["domain"]
    domain["centres"] = [row[:5] for row in domain["centres"]]
    domain["precision"] = [row[:5] for row in domain["precision"][:5]]


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another base": (config(lambda b: b.update(base="0" * 64)), "was trained on base 000000000000"),
    "another tokenizer": (config(lambda b: b.update(tokenizer="1" * 64)), "was trained with tokenizer 111111111111"),
    "fewer plans": (config(lambda b: b["heads"].update(plans=["direct", "steps"])), "does not fit its config"),
    "an unknown plan": (
        config(lambda b: b["heads"].update(plans=["direct", "steps", "verify", "dream"])), "unknown plan 'dream'",
    ),
    "an unknown block": (config(lambda b: b["heads"].update(layers=[1, 9])), "no layer 9: the base has 6 blocks"),
    "another depth": (config(lambda b: b["heads"].update(n_layers=12)), "does not fit its config"),
    "no number": (config(lambda b: b["heads"].update(width="wide")), "heads"),
    "a card of another version": (card(lambda b: b.update(version=99)), "version 99 is not 1"),
    "a card with more": (card(lambda b: b.update(more=1)), "more: Extra inputs are not permitted"),
    "a layer of another version": (
        config(lambda b: b.update(version=7)), "_config.json is of version 7, and this gnomon reads version 1",
    ),
    "a layer without a version": (config(lambda b: b.pop("version")), "is of version None, and this gnomon reads"),
    "a layer that is a list": (
        lambda folder: write(folder / CONFIG_FILE, "[1]"), "metacognition_config.json holds a list, not an object",
    ),
    "a card that is a list": (lambda folder: write(folder / FILE_NAME, "[1]"), "it is one JSON object, not a list"),
    "a temperature below zero": (
        card(lambda b: b["temperature"].update(before=-1.0)), "before: Input should be greater than or equal to 0.01",
    ),
    "a temperature that flattens all": (
        card(lambda b: b["running"].update(whole_temperature=1e300)), "whole_temperature: Input should be less than",
    ),
    "a shift that drowns all": (card(lambda b: b["shift"].update(before=1e308)), "before: Input should be less than"),
    "a clip beyond all": (
        card(lambda b: b["budget_clip"].update(operating_offset=1e6)), "operating_offset: Input should be less than",
    ),
    "a bound beyond all": (card(lambda b: b["running"].update(offset=1e6)), "running.offset: Input should be less"),
    "a bound below all": (card(lambda b: b["running"].update(offset=-1e6)), "running.offset: Input should be greater"),
    "a plan twice": (
        card(lambda b: b["running"].update(closing_plans=["steps", "steps"])),
        "closing_plans ('steps', 'steps') names a plan more than once",
    ),
    "a temperature that is no number": (
        card(lambda b: b["temperature"].update(after=float("nan"))), "after: Input should be a finite number",
    ),
    "a threshold above one": (card(lambda b: b.update(plan_threshold=1.7)), "plan_threshold: Input should be less"),
    "a card cut short": (torn, "cannot be used"),
    "a card that was edited": (card(lambda b: b.update(plan_threshold=0.5)), "was changed after fitting"),
    "a card of other heads": (card(lambda b: b.update(weights="2" * 64), True), "was fitted on heads 222222222222"),
    "a card of another depth": (
        card(lambda b: b["domain"].update(layer=77), True), "of block 77, but the base has 6 blocks of 160",
    ),
    "a card of another width": (card(narrow, True), "reads 5 numbers of block"),
    "weights that are no numbers": (weights(float("nan")), "holds NaN or infinite values"),
    "other weights": (weights(0.5), "gnomon calibrate"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_named_and_nothing_is_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CASES[name]
    folder = tmp_path / "layer"
    folder.mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE, FILE_NAME):
        shutil.copyfile(shipped("nano") / file, folder / file)
    (folder / BASE_FILE).write_text('{"base": "nano"}')
    change(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for verb in (["ask", "Compute 3 + 4.", "--model"], ["calibrate", "--n", "26", "--model"]):
        assert cli.run([*verb, str(folder)]) == cli.USER_ERROR
        said = capsys.readouterr()
        assert message in said.err and str(folder) in said.err and not said.out
        assert "Traceback" not in said.err and "pydantic" not in said.err and len(said.err.strip().splitlines()) == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
