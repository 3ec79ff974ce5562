"""Two processes under torchrun against one: gradients, sharding, checkpoints that either can take up (row T6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.base import checkpoint
from gnomon.model.folder import load_decoder
from gnomon.recipes import pretrain_run, pretraining
from gnomon.recipes.pretrain_config import resolve

TINY: dict[str, Any] = {
    "model.channels": 16, "model.layers": 2, "model.heads": 2, "model.streams": 2, "steps": 3, "rows": 4,
    "precision": "fp32", "corpus.tasks": "chain,knights", "corpus.levels": "1", "vocab_size": 512,
    "save_every": 3, "eval_every": 6, "seed": "two", "ema": 0.1,
}  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*words: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    return subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("two")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    six = resolve(None, {**TINY, "steps": 6})[0]
    pretrain_run.run(six, out / "run", stop=lambda step: step == 3)  # three steps alone
    pretrain_run.run(six, out / "straight", data=out / "run" / "data")
    torch.set_num_threads(before)
    script = Path(__file__).with_name("two.py")
    done = torchrun(str(script), str(out), str(out / "run" / "data"), json.dumps(TINY))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "facts.json").read_text())


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def test_gradients_of_two_processes_are_those_of_one(two: tuple[Path, dict[str, Any]]) -> None:
    found = {k: v for k, v in two[1].items() if k.startswith("gradients/")}
    assert set(found) == {f"gradients/{mode}/{micro}" for mode in ("ddp", "fsdp") for micro in (None, 1)}
    assert max(found.values()) <= 1e-6, found


def test_sharded_training_ends_where_replicated_does(two: tuple[Path, dict[str, Any]]) -> None:
    assert two[1]["export"] <= 1e-6


def test_small_facts_travel(two: tuple[Path, dict[str, Any]]) -> None:
    facts = two[1]
    assert facts["told"] == {"rank": 0, "ä": [1, None]}
    assert facts["total"] == {"x": 3.0, "y": 1.0} and facts["any"] == [True, False]


def test_two_sharded_processes_take_up_what_one_began(two: tuple[Path, dict[str, Any]]) -> None:
    out, facts = two
    assert (facts["run"]["step"], facts["run"]["stopped"]) == (6, False)
    ours, straight = losses(out / "run"), losses(out / "straight")
    assert list(ours) == [1, 2, 3, 4, 5, 6]
    assert all(ours[s] == straight[s] for s in (1, 2, 3))
    assert all(ours[s] == pytest.approx(straight[s], rel=1e-4) for s in (4, 5, 6))
    place = out / "run" / "checkpoints" / "checkpoint-6"
    checkpoint.verify_folder(place)
    wanted = load_decoder(out / "straight" / "checkpoints" / "checkpoint-6").state_dict()
    for folder in (place, place / "ema"):
        assert load_decoder(folder).state_dict().keys() == wanted.keys()
    there = load_decoder(place).state_dict()
    assert all(torch.allclose(there[k], wanted[k], atol=2e-3) for k in wanted)


def test_one_process_takes_up_what_two_began(two: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from gnomon.recipes.pretrain_config import resume_point, settle

    def seventh(run: str) -> float:
        _, found = resume_point(str(two[0] / run / "checkpoints" / "checkpoint-6"), tmp_path / run)
        config, changed = settle(found.values(), resolve(None, {"steps": 7}, found.values())[0])
        assert any(line.startswith("steps: 6 -> 7") for line in changed)
        pretrain_run.run(config, tmp_path / run, start=pretraining.start_at(found.path, changed))
        return losses(tmp_path / run)[7]

    assert seventh("run") == pytest.approx(seventh("straight"), rel=1e-4)


def test_a_reason_to_stop_in_one_process_stops_both(two: tuple[Path, dict[str, Any]]) -> None:
    out, facts = two
    assert facts["stop"]["stopped"] and facts["stop"]["step"] == 2
    assert checkpoint.newest(out / "stop" / "checkpoints").step == 2


def test_the_command_line_under_torchrun(two: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = two
    words = [w for k, v in {**TINY, "steps": 2}.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words += ["--run-dir", str(tmp_path / "run"), "--data", str(out / "run" / "data"), "--json"]
    done = torchrun("-m", "gnomon", "train", "pretrain", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout)  # one object, of one process
    assert facts["step"] == 2 and losses(tmp_path / "run")[1] == pytest.approx(losses(out / "run")[1], rel=1e-5)
    provenance = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-2" / "train" / "state.json").read_text())
    assert provenance["processes"] == 2
