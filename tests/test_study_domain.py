"""Study d by block: what is foreign by construction is flagged in the block that shows it, and in no other."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from gnomon.base.seeds import numpy_generator
from gnomon.training.labels import LabelledProblem, LabelSet, Rollout, StrategyLabels

FOLDER = Path(__file__).parents[1] / "benchmarks"


def labels(n: int) -> LabelSet:
    """Three families; block 1 tells them apart, block 0 is the same noise for all."""
    draw = numpy_generator("study-domain-test")
    names = ("a", "b", "c")
    problems = []
    for i in range(n):
        state = draw.normal(size=(2, 6)).astype(np.float32)
        state[1, i % 3] += 40.0
        cell = StrategyLabels(state, (Rollout(True, 3, 2, -0.1, True, state, True),))
        problems.append(LabelledProblem(f"{i:016x}", names[i % 3], 1, state, {"steps": cell}))
    return LabelSet(("steps",), tuple(problems))


def test_blocks_are_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    study = importlib.import_module("study_domain")
    found = study.blocks(labels(600), (0, 1))
    assert found[1]["left_out"] == {"a": 1.0, "b": 1.0, "c": 1.0} and found[1]["in_domain"] < 0.06
    assert max(found[0]["left_out"].values()) < 0.1, "noise is nobody's home"
    assert capsys.readouterr().out.count("\n| ") >= 3
