"""`gnomon check budget` as people type it: one object, exit codes, refusals before anything slow is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gnomon.conformance.local import EngineClient
from gnomon.decoding.budget import BudgetConfig
from gnomon.interfaces import cli
from gnomon.interfaces.commands.check import BREACH


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(words)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_sound_model_gives_one_object_and_zero(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "check", "budget", "nano", "--n", "24", "--seed", "cli", "--max-batch", "8", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["ok"] and facts["model"] == "nano" and err == ""
    assert facts["requests"] == 24 and facts["overshoot_tokens"] == facts["leaked"] == 0
    assert facts["answered_rate"] >= 0.995 and facts["neighbours_identical"] == 1.0
    assert set(facts["violations"].values()) == {0}


def test_a_breach_exits_with_one_and_names_rule_and_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = BudgetConfig.cap.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(BudgetConfig, "cap", property(lambda self: cap(self) + 1))
    monkeypatch.setattr(EngineClient, "predicts", property(lambda self: False, lambda self, value: None), raising=False)
    code, out, err = call(capsys, "check", "budget", "nano", "--n", "24", "--json")
    facts = json.loads(out)
    assert code == BREACH == 1 and not facts["ok"]
    assert facts["overshoot_tokens"] == facts["violations"]["overshoot"] > 0
    assert "overshoot: request check-" in err
    code, out, err = call(capsys, "check", "budget", "nano", "--n", "24")
    assert code == BREACH and "broken rules" in out and "overshoot" in out


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "check", "budget", "nano", "--n", "8")
    assert code == 0 and "answered_rate" in out and "neighbours_identical" in out and "broken" not in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["http://localhost:8000/v1"], "folder"),
        (["https://x.org"], "cannot be checked yet"),
        (["nanno"], "nano"),
        (["nano", "--n", "0"], "at least 1"),
        (["nano", "--n", "many"], "many"),
        (["nano", "--max-batch", "0"], "--max-batch"),
        (["nano", "--answered", "99"], "between 0 and 1"),
        (["/no/such/folder"], "no model folder"),
        ([], "model"),
    ],
)
def test_bad_input_is_refused_with_what_to_write(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    code, out, err = call(capsys, "check", "budget", *words)
    assert code == cli.USER_ERROR and expected.lower() in err.lower() and out == "" and "Traceback" not in err


def test_a_url_is_refused_without_torch() -> None:
    code = (
        "import sys; from gnomon.interfaces.cli import run\n"
        "sys.exit(run(['check', 'budget', 'http://x']) != 2 or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_names_every_option_with_its_meaning() -> None:
    command = cli.build()["check"]["budget"]
    arguments = [a for a in command.assemble_argument_collection(parse_docstring=True) if a.show]
    assert len(arguments) == 7 and all((a.parameter.help or "").strip() for a in arguments)
