"""Kill -9 at random moments of training and saving: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gnomon.recipes.pretrain_config import resolve
from gnomon.recipes.pretrain_run import prepare_data

TINY: dict[str, Any] = {
    "model.channels": 16, "model.layers": 1, "model.heads": 2, "model.streams": 2, "steps": 24, "rows": 2,
    "precision": "fp32", "corpus.tasks": "chain,knights", "corpus.levels": "1", "vocab_size": 512,
    "save_every": 3, "eval_every": 100, "keep": 2, "ema": 0.1,
}  # fmt: skip


def killed(out: Path, rounds: int, steps: int) -> dict[str, Any]:
    tiny = {**TINY, "steps": steps}
    prepare_data(out / "data", resolve(None, tiny)[0])
    script = Path(__file__).with_name("kill.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(rounds), json.dumps(tiny)],
        capture_output=True, text=True, timeout=3000, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(facts)
    assert facts["kills"] == rounds
    assert facts["unreadable"] == 0 and facts["unequal"] == 0
    assert facts["worst_loss"] <= TINY["save_every"]
    return facts


def test_a_few_kills(tmp_path: Path) -> None:
    killed(tmp_path, 4, 9)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    facts = killed(tmp_path, 200, 24)
    assert facts["while_saving"] >= 10 and facts["resumed"] >= 50 and facts["finished"] >= 3
