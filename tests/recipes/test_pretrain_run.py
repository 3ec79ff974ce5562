"""A pretraining run in its folder: what it writes, exact resume, what changes on resume, what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.base import checkpoint
from gnomon.base import config as configs
from gnomon.base.errors import CheckpointError, ConfigError, UnknownNameError
from gnomon.base.telemetry import MemorySink
from gnomon.model.folder import load_decoder
from gnomon.recipes import pretrain_run, pretraining
from gnomon.recipes.pretrain import mixture_of
from gnomon.recipes.pretrain_config import PretrainRunConfig, resolve, resume_point, settle

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "model.channels": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.streams": 2,
    "steps": 6,
    "rows": 2,
    "precision": "fp32",
    "corpus.tasks": "chain,knights",
    "corpus.levels": "1",
    "vocab_size": 512,
    "save_every": 3,
    "eval_every": 6,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a break; its corpus serves the other tests too."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    torch.set_num_threads(1)
    pretrain_run.run(resolve(None, TINY)[0], folder)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resume(
    folder: Path, data: Path | None, overrides: dict[str, Any], sink: MemorySink | None = None
) -> dict[str, Any]:
    place, found = resume_point("auto", folder)
    assert place == folder
    config, _ = resolve(None, overrides, found.values())
    config, changed = settle(found.values(), config)
    start = pretraining.start_at(found.path, changed, found.skipped)
    return pretrain_run.run(config, folder, data=data, start=start, sinks=[sink] if sink else [])


def test_a_run_leaves_what_a_run_folder_holds(straight: Path) -> None:
    assert [r["step"] for r in rows(straight)] == [1, 2, 3, 4, 5, 6]
    names = {"time", "tokens", "train/loss", "train/lr", "train/grad_norm", "train/tok_per_sec"}
    assert all(names <= set(r) for r in rows(straight))
    assert "eval/logic_accuracy" in rows(straight)[-1] and "eval/logic_accuracy" not in rows(straight)[0]
    assert json.loads((straight / "status.json").read_text())["state"] == "done"
    samples = [json.loads(x) for x in (straight / "samples" / "step-6.jsonl").read_text().splitlines()]
    assert len(samples) == pretraining.CHECK_PUZZLES and {s["task"] for s in samples} == {"knights"}
    assert checkpoint.steps(straight / "checkpoints") == [3, 6]
    assert (straight / "checkpoints" / "latest").read_text().strip() == "checkpoint-6"


def test_a_checkpoint_is_complete_and_loads(straight: Path) -> None:
    folder = straight / "checkpoints" / "checkpoint-6"
    checkpoint.verify_folder(folder)
    named = {r["name"] for r in checkpoint.read_manifest(folder)["files"]}
    wanted = {"config.json", "model.safetensors", "tokenizer.model", "resolved.yaml", "provenance.json"}
    assert wanted | {"train/state.json", "train/0-muon.safetensors", "train/1-adamw.safetensors"} == named
    assert load_decoder(folder).config.channels == 16


def test_three_steps_and_three_resumed_are_six_straight(straight: Path, tmp_path: Path) -> None:
    config = resolve(None, TINY)[0]
    facts = pretrain_run.run(config, tmp_path, data=straight / "data", stop=lambda step: step == 3)
    assert facts["stopped"] and facts["step"] == 3
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    resume(tmp_path, None, {})  # the corpus is found where the checkpoint says
    assert not (tmp_path / "data").exists()
    pick = ("step", "tokens", "train/loss", "train/grad_norm", "train/lr")
    assert [[r[k] for k in pick] for r in rows(tmp_path)] == [[r[k] for k in pick] for r in rows(straight)]
    for name in ("model.safetensors", "train/0-muon.safetensors", "train/1-adamw.safetensors"):
        ours = (tmp_path / "checkpoints" / "checkpoint-6" / name).read_bytes()
        assert ours == (straight / "checkpoints" / "checkpoint-6" / name).read_bytes(), name


def test_resume_lists_changes_a_new_rate_wins_and_undone_rows_go(straight: Path, tmp_path: Path) -> None:
    config = resolve(None, TINY)[0]
    pretrain_run.run(config, tmp_path, data=straight / "data", stop=lambda step: step == 4)
    torn = tmp_path / "checkpoints" / "checkpoint-4" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-4])
    sink = MemorySink()
    resume(tmp_path, straight / "data", {"optim.lr": 0.001}, sink)
    told = {e.data["what"] for e in sink.events if e.name == "resume/changed"}
    assert "optim.lr: 0.01 -> 0.001 (takes effect)" in told
    assert [e.data["name"] for e in sink.events if e.name == "checkpoint/skipped"] == ["checkpoint-4"]
    now, before = rows(tmp_path), rows(straight)
    assert [r["step"] for r in now] == [1, 2, 3, 4, 5, 6]
    assert now[4]["train/lr"] == pytest.approx(before[4]["train/lr"] / 10)
    assert now[3]["train/loss"] == before[3]["train/loss"] and now[5]["train/loss"] != before[5]["train/loss"]
    kept = configs.read_file(tmp_path / "resolved.yaml")
    assert kept["optim"]["lr"] == 0.001


def test_a_changed_mixture_takes_effect(straight: Path, tmp_path: Path) -> None:
    config = resolve(None, TINY)[0]
    pretrain_run.run(config, tmp_path, data=straight / "data", stop=lambda step: step == 3)
    sink = MemorySink()
    facts = resume(tmp_path, None, {"corpus.tasks": "count"}, sink)
    assert facts["step"] == 6
    (told,) = [e.data["what"] for e in sink.events if e.name == "resume/changed"]
    assert told.startswith("corpus.tasks: ['chain', 'knights'] -> ['count'] (takes effect; records are made anew")
    assert [e.name for e in sink.events if e.name == "resume/data"] == ["resume/data"]
    (made,) = tmp_path.glob("data-*")
    assert json.loads((made / "train.json").read_text())["config"]["tasks"] == ["count"]
    now, before = rows(tmp_path), rows(straight)
    assert now[2]["train/loss"] == before[2]["train/loss"] and now[4]["train/loss"] != before[4]["train/loss"]
    resume(tmp_path, None, {"steps": 7})  # the new records are found again
    assert [p for p in tmp_path.glob("data*") if p.is_dir()] == [made]


def test_a_signal_ends_the_step_and_saves(straight: Path, tmp_path: Path) -> None:
    def interrupt(step: int) -> bool:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    before = signal.getsignal(signal.SIGINT)
    facts = pretrain_run.run(resolve(None, TINY)[0], tmp_path, data=straight / "data", stop=interrupt)
    assert facts["stopped"] and facts["step"] in (2, 3)  # Python delivers a signal between two instructions
    assert checkpoint.newest(tmp_path / "checkpoints").step == facts["step"]
    assert signal.getsignal(signal.SIGINT) is before


def test_where_a_run_may_start(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume auto"):
        resume_point(None, straight)
    assert resume_point("auto", tmp_path)[1].path is None
    assert resume_point(str(straight), None)[1].path == straight / "checkpoints" / "checkpoint-6"
    one = straight / "checkpoints" / "checkpoint-3"
    assert resume_point(str(one), None)[0] == straight
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        resume_point(str(tmp_path / "none"), None)


def test_a_finished_run_is_left_as_it_is_and_fewer_steps_are_refused(straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    facts = resume(straight, straight / "data", {})
    assert (facts["step"], facts["stopped"]) == (6, False)
    with pytest.raises(ConfigError, match="behind step 6; raise steps"):
        resume(straight, straight / "data", {"steps": 5})
    assert (straight / "metrics.jsonl").read_bytes() == before
    assert configs.read_file(straight / "resolved.yaml")["steps"] == 6


def test_a_change_of_shape_is_refused(straight: Path) -> None:
    old = configs.read_file(straight / "resolved.yaml")
    with pytest.raises(ConfigError, match=r"model\.channels is 16 in the checkpoint and cannot become 32"):
        settle(old, resolve(None, {"model.channels": 32}, old)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"model.preset": "mikro"}, "did you mean 'micro'"),
        ({"corpus.tasks": "chian"}, "did you mean 'chain'"),
        ({"row_length": 128}, "row_length 128 is below corpus.max_tokens 256"),
        ({"keep": 1}, "keep"),
        ({"corpus.weights": "count=x"}, "'count=x' is no weight; write count=2"),
        ({"corpus.weights": "cuont=2"}, "did you mean 'count'"),
        ({"corpus.tasks": "chain", "corpus.weights": "count=2"}, "unknown task in corpus.weights 'count'"),
    ],
)
def test_bad_values_teach(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        resolve(None, overrides)


def test_the_corpus_follows_from_the_run_unless_given() -> None:
    config, origins = resolve(None, {"steps": 1000, "seed": 7})
    assert config.seed == config.corpus.stream == "7"
    assert config.corpus.records == -(-1000 * 8 * 256 // 56)
    assert origins["corpus.records"] == "derived"
    assert resolve(None, {"corpus.records": 2500})[0].corpus.records == 2500
    assert PretrainRunConfig().rows * PretrainRunConfig().row_length <= 4096


def test_weights_shift_the_mixture() -> None:
    config = resolve(None, {"corpus.tasks": "chain,count", "corpus.weights": "count=3", "corpus.levels": "1"})[0].corpus
    shown = [mixture_of(config).item(i).problem.task for i in range(400)]
    assert 0.68 < shown.count("count") / 400 < 0.82


def test_an_estimate_says_time_and_memory() -> None:
    facts = pretrain_run.estimate(resolve(None, TINY)[0])
    assert facts["tokens"] == 6 * 2 * 256 and facts["seconds_per_step"] > 0
    assert facts["memory_mb"] * 2**20 > 4 * facts["parameters"]


def test_a_run_starts_from_the_weights_of_another_model(tmp_path: Path) -> None:
    first, _ = resolve(None, {**TINY, "steps": 3})
    begun = pretrain_run.run(first, tmp_path / "a", data=tmp_path / "data")
    more, _ = resolve(None, {**TINY, "steps": 1, "optim.lr": 1e-9, "optim.embed_lr": 1e-9, "optim.unembed_lr": 1e-9,
                             "optim.hyper_lr": 1e-9, "init": begun["checkpoint"]})  # fmt: skip
    again = pretrain_run.run(more, tmp_path / "b", data=tmp_path / "data")
    old, new = load_decoder(begun["checkpoint"]).state_dict(), load_decoder(again["checkpoint"]).state_dict()
    assert all(torch.allclose(old[k], new[k], atol=1e-5) for k in old)
    wider, _ = resolve(None, {**TINY, "steps": 1, "model.channels": 32, "init": begun["checkpoint"]})
    with pytest.raises(ConfigError, match="shape"):
        pretrain_run.run(wider, tmp_path / "c", data=tmp_path / "data")
