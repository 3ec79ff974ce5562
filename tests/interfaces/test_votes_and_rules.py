"""Votes, soft rules and running estimates from the command line."""

from __future__ import annotations

import inspect
import io
import json
from typing import Any

import pytest
from tests.interfaces.test_cli import call

from gnomon.reasoner import Reasoner


def test_votes_answer_with_a_count_of_paths(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "ask", "Compute 3 + 4.", "--votes", "3", "--json")
    body = json.loads(out)
    assert code == 0 and body["answer"] == "7" and body["votes"] == 3 and sum(body["counts"].values()) >= 3
    assert body["think_tokens_all"] >= body["budget"]["used"]
    code, _, err = call(capsys, "ask", "hi", "--votes", "0")
    assert code != 0 and "paths must be a whole number" in err


def test_votes_sample_unless_told_otherwise_and_show_the_thoughts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("ask", "vote"):
        real = getattr(Reasoner, name)

        def noted(self: Reasoner, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            given = inspect.signature(_real).bind(self, *args, **kwargs).arguments
            asked.append(given["temperature"])
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(Reasoner, name, noted)
    words = ("ask", "Compute 34 + 27 - 15.", "--plan", "steps")
    code, _, err = call(capsys, *words, "--votes", "3", "--temperature", "0")
    assert code != 0 and "3 greedy paths are 3 times the same one" in err and not asked
    code, _, quiet = call(capsys, *words, "--votes", "3")
    again, _, shown = call(capsys, *words, "--votes", "3", "--show")
    thoughts, _, told = shown.rpartition(quiet)
    assert code == again == 0 and told == "" and "34" in thoughts
    for more in ((), ("--temperature", "0"), ("--temperature", "0.3"), ("--votes", "2", "--temperature", "0.4")):
        assert call(capsys, *words, *more)[0] == 0
    assert asked == [0.8, 0.8, 0.0, 0.0, 0.3, 0.4]


def test_evaluate_measures_votes_beside_a_single_path(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", "--tasks", "chain,sort", "--n", "10", "--levels", "1", "--votes", "3")
    code, out, _ = call(capsys, *words, "--json")
    body = json.loads(out)
    assert code == 0 and body["n"] == 10 and body["votes"] == 3 and set(body["by_task"]) == {"chain", "sort"}
    assert body["accuracy_ci"][0] <= body["accuracy"] <= body["accuracy_ci"][1] and body["accuracy"] > 0.5
    code, out, _ = call(capsys, *words)
    assert code == 0 and "majority of 3 paths" in out
    code, _, err = call(capsys, *words, "--temperature", "0")
    assert code != 0 and "a temperature above 0" in err


def test_rules_change_the_stops_and_bad_ones_teach(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", "--tasks", "chain", "--n", "10", "--levels", "4", "--plan", "steps", "--budget", "none")
    words = (*words, "--json")
    code, out, _ = call(capsys, *words, "--rules", "cut:tokens=3")
    body = json.loads(out)
    assert code == 0 and set(body["stop"]) == {"slack"} and body["think_tokens_mean"] == 3
    assert body["blocks"]["truncated"] == 10
    for text, told in (("slak", "did you mean 'slack'"), ("cut", "needs tokens"), ("slack:share", "name:key=value")):
        code, _, err = call(capsys, *words, "--rules", text)
        assert code != 0 and told in err, text


def test_rules_change_the_points_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sweep", "--tasks", "chain", "--n", "4", "--levels", "2", "--val-n", "4", "--json")
    plain, ruled = (json.loads(call(capsys, *words, *more)[1]) for more in ((), ("--rules", "cut:tokens=3")))
    most = [max(p["tokens"] for p in body["points"]) for body in (plain, ruled)]
    assert most[0] > 3 == most[1]
    assert [p["budget"] for p in plain["points"]] == [p["budget"] for p in ruled["points"]]


@pytest.mark.parametrize("verb", ["evaluate", "sweep"])
def test_a_rule_that_the_layer_cannot_serve_is_refused_before_anything_is_decoded(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gnomon.evaluation.runner.problems", lambda *_, **__: pytest.fail("drawn first"))
    code, out, err = call(capsys, verb, "--n", "4", "--rules", "sure")
    assert code != 0 and not out and "rule 'sure' needs" in err and "--trial-n" in err
    assert len(err.strip().splitlines()) == 1, "no progress"


def test_chat_keeps_one_budget_for_a_session(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = "Compute 34 + 27 - 15."
    lines = ("/plan steps", "/budget 12", ask, "/scope session", ask, ask, "/scope chat", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, _, err = call(capsys, "chat")
    used = [line.split()[1] for line in err.splitlines() if line.strip().startswith("thought ")]
    assert code == 0 and used == ["12", "12", "0"] and "unknown scope 'chat'" in err
