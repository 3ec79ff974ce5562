"""reasoning-gym adapter: hashed items, strict scores, refused leaks, no model text executed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from gnomon.base.errors import ConfigError, UnknownNameError
from gnomon.tasks import gym
from gnomon.tasks.procedural import problems, resolve_tasks
from gnomon.tasks.verifiers import verify

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym not installed")
NAMES = ["chain_sum", "letter_counting", "countdown", "prime_factorization", "kakurasu", "gsm_symbolic", "tsumego"]


@needs_gym
@pytest.mark.parametrize("name", NAMES)
def test_gold_passes_and_garbage_fails(name: str) -> None:
    for problem in problems(f"gym:{name}", "test", "t1", 5):
        assert verify(problem, problem.answer).correct
        gold = problem.answer
        for bad in ("", "zzz", "[]", f"{gold} zzz", f"{gold} or 7", f"the answer is {gold}", "x" * 5000):
            assert not verify(problem, bad).correct, (problem.prompt, bad)


@needs_gym
def test_splits_and_streams_share_nothing_across_splits() -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "val", "calibration", "test"):
        for stream in ("a", "b"):
            seen.setdefault(split, set()).update(p.prompt for p in problems("gym:chain_sum", split, stream, 40))
    splits = list(seen.values())
    assert not any(splits[i] & splits[j] for i in range(4) for j in range(i))
    assert len(seen["test"]) > 60


@needs_gym
def test_streams_are_reproducible_and_different() -> None:
    a = [p.prompt for p in problems("gym:lcm", "test", "a", 10)]
    assert a == [p.prompt for p in problems("gym:lcm", "test", "a", 10)]
    assert a != [p.prompt for p in problems("gym:lcm", "test", "b", 10)]


@needs_gym
@pytest.mark.parametrize("name", sorted(gym.LEAKING))
def test_leaking_datasets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="leaks reward"):
        resolve_tasks(f"gym:{name}")


@needs_gym
def test_leaky_flag_still_pays_for_the_gold_alone() -> None:
    problem = gym.GymSource("game_of_life_halting", allow_leaky=True).draw(1, "test", "s", 0)
    assert verify(problem, problem.answer).correct
    assert not verify(problem, "zzz").correct


@needs_gym
def test_unknown_dataset_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="chain_sum"):
        resolve_tasks("gym:chainsum")


@needs_gym
def test_another_right_answer_counts_where_the_scorer_checks_it() -> None:
    problem = gym.GymSource("countdown").draw(1, "test", "s", 1)
    assert verify(problem, f"({problem.answer})").correct


@needs_gym
def test_no_scorer_that_evaluates_text_sees_model_text() -> None:
    """Every module of the installed package that could run an answer is on a list here, also after an upgrade."""
    package = Path(importlib.util.find_spec("reasoning_gym").origin).parent  # type: ignore[union-attr, arg-type]
    runs = re.compile(r"parse_expr\((?:user_)?answer|\beval\((?:user_)?answer|sympify\(|\bexec\((?:user_)?answer")
    found = {f.stem for f in package.rglob("*.py") if runs.search(f.read_text(encoding="utf-8"))}
    assert found <= gym.EXECUTING | set(gym._SAFE_TEXT), found
    assert {"n_queens", "countdown"} <= found


@needs_gym
@pytest.mark.parametrize("text", ["__import__('os').system('true')", "9**9**9", "1//1", "a", "(1)*\t*2"])
def test_countdown_scorer_sees_arithmetic_only(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gym.GymSource("countdown").draw(1, "test", "s", 2)
    monkeypatch.setattr(gym, "_score", lambda *_: pytest.fail("the scorer was called"))
    assert not gym.check(problem, text).correct


def test_missing_package_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        gym.GymSource("chain_sum")
