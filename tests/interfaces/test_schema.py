"""Schemas: what a run has written is accepted, what validation refuses is refused, and the text is stable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gnomon.base.config import dump_yaml
from gnomon.interfaces import cli
from gnomon.interfaces.commands.schema import CONFIGS, RECIPES, config_class
from gnomon.recipes.metacog import MetacogRunConfig
from gnomon.recipes.pretrain_config import resolve

jsonschema = pytest.importorskip("jsonschema")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("name", CONFIGS)
def test_a_schema_is_valid_and_stable(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "schema", name)
    again = call(capsys, "schema", name)[1]
    assert (code, out) == (0, again)
    body = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(body)
    assert body["title"] == config_class(name).__name__
    assert body["additionalProperties"] is False
    assert call(capsys, "schema", name, "--out", str(tmp_path / "s.json"))[:2] == (0, "")
    assert json.loads((tmp_path / "s.json").read_text()) == body


def test_resolved_values_of_runs_are_accepted_and_a_typing_error_is_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = {
        "pretrain": dump_yaml(resolve(None, {"steps": 7, "optim.lr": 0.003})[0]),
        "metacog": dump_yaml(MetacogRunConfig()),
    }
    assert set(texts) == set(RECIPES)
    for name, text in texts.items():
        check = jsonschema.Draft202012Validator(json.loads(call(capsys, "schema", name)[1]))
        values = yaml.safe_load(text)
        check.validate(values)
        (tmp_path / "resolved.yaml").write_text(text)
        code, out, _ = call(capsys, "validate", str(tmp_path / "resolved.yaml"), "--json")
        assert (code, json.loads(out)["checks"][0]["check"]) == (0, f"{name} config"), "the recipe is found by its keys"
        wrong = {("sede" if k == "seed" else k): v for k, v in values.items()}
        with pytest.raises(jsonschema.ValidationError, match="sede"):
            check.validate(wrong)
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        code, _, err = call(capsys, "validate", str(tmp_path / "wrong.yaml"))
        assert code == cli.USER_ERROR
        assert "did you mean 'seed'" in err
        with pytest.raises(jsonschema.ValidationError):
            check.validate({**values, "seed": [1]})


def test_names_are_listed_and_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(json.loads(call(capsys, "schema", "--json")[1])["schemas"]) == set(CONFIGS)
    assert "gnomon train pretrain" in call(capsys, "schema")[1]
    code, _, err = call(capsys, "schema", "pretrian")
    assert code == cli.USER_ERROR
    assert "did you mean 'pretrain'" in err
    assert call(capsys, "schema", "--out", "x.json")[0] == cli.USER_ERROR
    assert call(capsys, "validate", "a.yaml", "--config", "b.yaml")[0] == cli.USER_ERROR
