"""What a pretraining run does when the world fails: losses, memory, disk, data, signals, a second run, commands."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.base import checkpoint, control
from gnomon.base import config as configs
from gnomon.base.errors import ConfigError, DataError, DiskFullError, ModelError, RunBusyError
from gnomon.base.stopping import StopSignals
from gnomon.base.telemetry import MemorySink
from gnomon.model.folder import load_decoder
from gnomon.recipes import pretrain_run, pretraining
from gnomon.recipes.pretrain_config import PretrainRunConfig, resolve, resume_point, settle
from gnomon.training.loop import DivergedError, OutOfMemory

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "model.channels": 16, "model.layers": 1, "model.heads": 2, "model.streams": 2, "steps": 8, "rows": 4,
    "precision": "fp32", "corpus.tasks": "chain,knights", "corpus.levels": "1", "vocab_size": 512, "save_every": 2,
    "eval_every": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    pretrain_run.prepare_data(folder, config())
    return folder


def config(**changes: Any) -> PretrainRunConfig:
    return resolve(None, {**TINY, **changes})[0]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def named(sink: MemorySink, name: str) -> list[dict[str, Any]]:
    return [dict(e.data) for e in sink.events if e.name == name]


class Spoiler:
    """In place of `step_losses`: what `spoil(number of the data, loss)` returns is the loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        self.calls: list[int] = []
        self.numbers: list[int] = []
        plain, step = pretraining.step_losses, pretraining.Pretraining.losses

        def numbered(trainee: Any, number: int) -> Any:
            self.numbers.append(number)
            return step(trainee, number)

        def spoilt(*args: Any) -> Iterator[Any]:
            for loss, parts in plain(*args):
                yield spoil(self.numbers[-1], loss), parts

        monkeypatch.setattr(pretraining, "step_losses", spoilt)
        monkeypatch.setattr(pretraining.Pretraining, "losses", numbered)


# --- losses that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_step_is_left_out(bad: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spoiler(monkeypatch, lambda n, loss: loss * bad if n == 3 else loss)
    facts = pretrain_run.run(config(), tmp_path, data=data)
    assert (facts["step"], facts["skipped"], facts["roll_backs"]) == (8, 1, 0)
    found = rows(tmp_path)
    assert found[3]["train/loss"] is None and "train/loss" in found[3]["nonfinite"]
    assert [r["train/skipped"] for r in found] == [0, 0, 0, 1, 1, 1, 1, 1]
    before = load_decoder(tmp_path / "checkpoints" / "checkpoint-8").state_dict()
    assert all(torch.isfinite(v).all() for v in before.values())


def test_three_bad_steps_go_back_past_the_data_at_half_the_rate(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiler = Spoiler(monkeypatch, lambda n, loss: loss * math.nan if n in (3, 4, 5) else loss)
    sink = MemorySink()
    facts = pretrain_run.run(config(), tmp_path, data=data, sinks=[sink])
    assert (facts["step"], facts["roll_backs"], facts["skipped"]) == (8, 1, 3)
    (told,) = named(sink, "train/rolled_back")
    # steps 4, 5 and 6 (data 3 to 5) were bad; checkpoint-4 came in between, whose weights are those of step 3
    assert (told["bad_step"], told["to_step"], told["passed_over"], told["lr_scale"]) == (6, 4, 2, 0.5)
    assert spoiler.numbers == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    found = rows(tmp_path)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    plain = PretrainRunConfig()
    from gnomon.training.optim import schedule

    assert found[5]["train/lr"] == pytest.approx(0.005 * schedule(plain.optim, 5 / 8))


def test_a_run_goes_on_bit_for_bit_behind_a_roll_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spoiler(monkeypatch, lambda n, loss: loss * math.nan if n in (3, 4, 5) else loss)
    pretrain_run.run(config(), tmp_path / "straight", data=data)
    pretrain_run.run(config(), tmp_path / "halved", data=data, stop=lambda step: step == 7)
    _, found = resume_point("auto", tmp_path / "halved")
    pretrain_run.run(config(), tmp_path / "halved", data=data, start=pretraining.start_at(found.path))
    ours, straight = rows(tmp_path / "halved"), rows(tmp_path / "straight")
    assert [r["train/loss"] for r in ours] == [r["train/loss"] for r in straight]
    assert [r["train/lr"] for r in ours] == [r["train/lr"] for r in straight]


def test_it_ends_with_a_report_behind_the_second_roll_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spoiler(monkeypatch, lambda n, loss: loss * math.nan if n >= 3 else loss)
    with pytest.raises(DivergedError, match=r"3 steps in a row .* after 2 roll-backs .* last good checkpoint"):
        pretrain_run.run(config(steps=40), tmp_path, data=data)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    load_decoder(checkpoint.newest(tmp_path / "checkpoints").path)


def test_without_a_checkpoint_a_roll_back_is_a_fresh_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiler = Spoiler(monkeypatch, lambda n, loss: loss * math.nan if n in (0, 1, 2) else loss)
    facts = pretrain_run.run(config(save_every=50, ema=0.1), tmp_path, data=data)
    assert (facts["step"], facts["roll_backs"]) == (8, 1)
    assert spoiler.numbers == [0, 1, 2, *range(3, 11)]


def test_spoilt_weights_are_never_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def spoil(step: int) -> bool:
        if step == 3 and not done:
            done.append(step)
            with torch.no_grad():
                holder[0].model.unembed.weight[0, 0] = math.nan
        return False

    holder: list[Any] = []
    begin = pretraining.Pretraining.__init__

    def remember(trainee: Any, *args: Any) -> None:
        begin(trainee, *args)
        holder.append(trainee)

    monkeypatch.setattr(pretraining.Pretraining, "__init__", remember)
    sink = MemorySink()
    facts = pretrain_run.run(config(), tmp_path, data=data, stop=spoil, sinks=[sink])
    assert facts["step"] == 8 and facts["roll_backs"] == 1
    assert named(sink, "checkpoint/refused")
    for step in checkpoint.steps(tmp_path / "checkpoints"):
        load_decoder(tmp_path / "checkpoints" / f"checkpoint-{step}")  # refuses NaN


def test_an_evaluation_that_fails_or_sees_nan_does_not_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spoiler(monkeypatch, lambda n, loss: loss * math.nan if n in (2, 3, 4) else loss)
    facts = pretrain_run.run(config(eval_every=1), tmp_path / "a", data=data)
    assert (facts["step"], facts["roll_backs"]) == (8, 1)
    monkeypatch.undo()

    def broken(*_: Any) -> Any:
        raise ModelError("the model gives no finite log-probability")

    monkeypatch.setattr(pretraining, "logic_check", broken)
    sink = MemorySink()
    assert pretrain_run.run(config(eval_every=4), tmp_path / "b", data=data, sinks=[sink])["step"] == 8
    assert [e["step"] for e in named(sink, "eval/failed")] == [4, 8]


def test_text_is_passed_over_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "".join(json.dumps({"text": f"number {i} and some more words of text {i * 7}"}) + "\n" for i in range(600))
    (tmp_path / "a.jsonl").write_text(body)
    seen: list[tuple[int, bytes]] = []
    plain = pretraining.step_losses

    def spoilt(step: Any, *rest: Any) -> Iterator[Any]:
        bad = step.rows[0].ids.tobytes() in wanted
        seen.append((len(seen), step.rows[0].ids.tobytes()))
        for loss, parts in plain(step, *rest):
            yield (loss * math.nan if bad else loss), parts

    wanted: set[bytes] = set()
    values = {"text.files": str(tmp_path / "a.jsonl"), "text.shuffle": 0, "text.max_len": 64, "rows": 2}
    monkeypatch.setattr(pretraining, "step_losses", spoilt)
    pretrain_run.run(config(**values), tmp_path / "plain")
    order = [ids for _, ids in seen]
    wanted.update(order[3:6])
    seen.clear()
    facts = pretrain_run.run(config(**values), tmp_path / "run")
    assert (facts["step"], facts["roll_backs"], facts["skipped"]) == (8, 1, 3)
    assert [ids for _, ids in seen][:8] == order and len({ids for _, ids in seen}) == len(seen) == 10


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_micro_batch_that_does_not_fit_is_halved_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain_run.run(config(), tmp_path / "plain", data=data)
    tall: list[int] = []

    def short(ids: torch.Tensor, most: int) -> None:
        tall.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    plain = pretraining.Objective.forward

    def small(most: int) -> None:
        def forward(objective: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            short(ids, most)
            return plain(objective, ids, *rest)

        monkeypatch.setattr(pretraining.Objective, "forward", forward)

    small(2)
    sink = MemorySink()
    pretrain_run.run(config(), tmp_path / "halved", data=data, sinks=[sink])
    assert tall[0] == 4 and set(tall[1:]) == {2}
    assert len(named(sink, "train/memory")) == 1
    ours, wanted = rows(tmp_path / "halved"), rows(tmp_path / "plain")
    assert [r["train/loss"] for r in ours] == pytest.approx([r["train/loss"] for r in wanted], rel=2e-3)
    assert [r["tokens"] for r in ours] == [r["tokens"] for r in wanted]

    small(4)

    def shrinking(step: int) -> bool:
        if step == 3:
            small(1)
        return False

    with pytest.raises(OutOfMemory, match="step 4 does not fit into memory .* lower micro_rows"):
        pretrain_run.run(config(save_every=50), tmp_path / "over", data=data, stop=shrinking)
    assert checkpoint.newest(tmp_path / "over" / "checkpoints").step == 3  # saved before it ended


# --- disk ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_the_old_checkpoints_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretraining.save_state

    def full(folder: Path, states: Any, facts: Any) -> None:
        if facts["step"] >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(folder, states, facts)

    monkeypatch.setattr(pretraining, "save_state", full)
    with pytest.raises(DiskFullError) as caught:
        pretrain_run.run(config(), tmp_path, data=data)
    assert caught.value.exit_code == 28
    root = tmp_path / "checkpoints"
    assert checkpoint.steps(root) == [2, 4] and checkpoint.newest(root).step == 4
    assert not list(root.glob(".tmp-*")) and not (root / ".ballast").exists()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_disk_that_is_full_between_checkpoints_still_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gnomon.base.runs import Run

    plain = Run.row

    def full(run: Run, step: int, **values: Any) -> None:
        if step == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(run, step, **values)

    monkeypatch.setattr(Run, "row", full)
    with pytest.raises(DiskFullError, match="checkpoint-5 was saved in the space that was held") as caught:
        pretrain_run.run(config(), tmp_path, data=data)
    assert caught.value.saved == "checkpoint-5"
    assert checkpoint.newest(tmp_path / "checkpoints").step == 5


def test_two_runs_in_one_folder_are_refused(data: Path, tmp_path: Path) -> None:
    def second(step: int) -> bool:
        with pytest.raises(RunBusyError, match=str(os.getpid())):
            pretrain_run.run(config(), tmp_path, data=data)
        return step == 1

    facts = pretrain_run.run(config(), tmp_path, data=data, stop=second)
    assert facts["stopped"] and [r["step"] for r in rows(tmp_path)] == [1]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["shrinks", "garbage"])
def test_data_that_breaks_while_it_is_read_is_named(harm: str, data: Path, tmp_path: Path) -> None:
    import shutil

    mine = tmp_path / "data"
    shutil.copytree(data, mine)

    def break_it(step: int) -> bool:
        if step == 3:
            body = (mine / "train.bin").read_bytes()
            (mine / "train.bin").write_bytes(body[: len(body) // 50] if harm == "shrinks" else b"\xff" * len(body))
        return False

    with pytest.raises(DataError, match=r"became shorter" if harm == "shrinks" else r"holds id 65535 .* vocabulary"):
        pretrain_run.run(config(steps=200), tmp_path / "run", data=mine, stop=break_it)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step >= 2


def test_records_of_another_mixture_are_not_taken(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain_run.run(config(steps=1), run)
    pretrain_run.run(config(steps=1, **{"corpus.tasks": "count"}), run)  # the run's own folder: made beside
    (made,) = run.glob("data-*")
    assert json.loads((made / "train.json").read_text())["config"]["tasks"] == ["count"]
    asked, origins = resolve(None, {**TINY, "corpus.tasks": "count"})
    with pytest.raises(ConfigError, match=r"have tasks = .*chain.*, you ask for .*count.*--corpus.tasks out"):
        pretrain_run.run(asked, tmp_path / "other", data=data, origins=origins)
    assert not (tmp_path / "other").exists()
    pretrain_run.run(config(steps=1, seed="another"), tmp_path / "third", data=data)
    kept = configs.read_file(tmp_path / "third" / "resolved.yaml")["corpus"]
    assert kept["stream"] == json.loads((data / "train.json").read_text())["config"]["stream"]


def test_a_checkpoint_is_not_taken_into_another_run(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pretrain_run.run(config(steps=2), tmp_path / name, data=data)
    before = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run of its own"):
        resume_point(str(tmp_path / "a" / "checkpoints" / "checkpoint-2"), tmp_path / "b")
    with pytest.raises(ConfigError, match="holds a run of its own"):
        resume_point(str(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == before
    assert resume_point(str(tmp_path / "a" / "checkpoints" / "checkpoint-2"), tmp_path / "a")[1].path is not None


def test_metrics_that_are_torn_and_weights_with_nan_do_not_block_a_resume(data: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from gnomon.base.checkpoint import write_manifest

    pretrain_run.run(config(), tmp_path, data=data, stop=lambda step: step == 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], "garbage\n", *lines[1:]]))
    spoilt = tmp_path / "checkpoints" / "checkpoint-4"
    decoder = load_decoder(spoilt)
    state = decoder.state_dict()
    save_file({"decoder." + k: v * math.nan if "unembed" in k else v for k, v in state.items()},
              spoilt / "model.safetensors")  # fmt: skip
    write_manifest(spoilt, {"step": 4, "serial": 99})
    place, found = resume_point("auto", tmp_path)
    assert found.path is not None and found.path.name == "checkpoint-2" and "NaN" in found.skipped[0][1]
    sink = MemorySink()
    pretrain_run.run(config(), tmp_path, data=data, start=pretraining.start_at(found.path), sinks=[sink])
    assert place == tmp_path and [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(named(sink, "metrics/unreadable")) == 1


# --- signals ---------------------------------------------------------------------------------------------------------


class Terminate:
    """Sends SIGTERM to this process once, the first time it is called."""

    def __init__(self) -> None:
        self.sent = False

    def __call__(self, *_: Any, **__: Any) -> None:
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("phase", ["tokenizer", "corpus", "loading", "step", "check", "save", "paused"])
def test_sigterm_in_every_phase(phase: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shot = Terminate()

    def before(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            shot()
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    changes: dict[str, Any] = {"steps": 500, "eval_every": 2}
    stop = None
    folder: Path | None = data
    if phase in ("tokenizer", "corpus"):
        folder = None  # made in the run
        before(pretrain_run, "tokenizer_for" if phase == "tokenizer" else "prepare")
    elif phase == "loading":
        before(pretraining.Pretraining, "_model")
    elif phase == "check":
        before(pretraining, "logic_check")
    elif phase == "save":
        before(pretraining, "save_decoder")
    elif phase == "step":
        stop = lambda step: bool(step == 3 and shot())  # noqa: E731
    else:

        def stop(step: int) -> bool:
            if step == 2:
                control.send(tmp_path, "pause")
                threading.Timer(0.5, shot).start()
            return False

    began = time.monotonic()
    facts = pretrain_run.run(config(**changes), tmp_path, data=folder, stop=stop)
    assert shot.sent and time.monotonic() - began < 10
    assert facts["stopped"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    if facts["step"]:
        assert checkpoint.newest(tmp_path / "checkpoints").step == facts["step"]
    else:
        assert phase in ("tokenizer", "corpus")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL or not isinstance(
        signal.getsignal(signal.SIGTERM), type(StopSignals)
    )


def test_a_terminal_that_goes_away_stops_nothing(data: Path, tmp_path: Path) -> None:
    def hang_up(step: int) -> bool:
        if step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return False

    assert pretrain_run.run(config(steps=4), tmp_path, data=data, stop=hang_up)["step"] == 4
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_are_obeyed_and_answered(data: Path, tmp_path: Path) -> None:
    sink = MemorySink()
    paused: list[float] = []

    def drive(step: int) -> bool:
        if step == 2:
            control.send(tmp_path, "lr", 0.001)
            control.send(tmp_path, "budget", 7)
        if step == 3:
            control.send(tmp_path, "checkpoint")
            control.send(tmp_path, "pause")
            (tmp_path / "control.jsonl").open("a").write('{"seq": 99, "command": "explode"}\n')
            threading.Timer(0.6, lambda: control.send(tmp_path, "resume")).start()
            paused.append(time.monotonic())
        if step == 4:
            paused.append(time.monotonic())
            control.send(tmp_path, "undo")
            control.send(tmp_path, "undo")
        if step == 6:
            control.send(tmp_path, "stop")
        return False

    facts = pretrain_run.run(
        config(steps=50, save_every=20, eval_every=3), tmp_path, data=data, stop=drive, sinks=[sink]
    )
    assert facts["stopped"] and facts["step"] == 6
    assert paused[1] - paused[0] >= 0.5
    acks = {a["seq"]: a for a in named(sink, control.ACK)}
    assert [a["command"] for a in acks.values()] == [
        "lr",
        "budget",
        "checkpoint",
        "pause",
        "resume",
        "undo",
        "undo",
        "stop",
    ]
    assert all(a["ok"] for a in acks.values())
    (bad,) = named(sink, "control/rejected")
    assert "explode" in bad["why"]
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 6]
    rates = [r["train/lr"] for r in rows(tmp_path)]
    assert rates[2] == pytest.approx(rates[1] / 10, rel=0.1) and rates[4] == pytest.approx(rates[1], rel=0.1)
    samples = [json.loads(x) for x in (tmp_path / "samples" / "step-3.jsonl").read_text().splitlines()]
    assert max(s["used"] for s in samples) <= 7
    ack = control.wait_ack(tmp_path, 1, timeout=0.1)
    assert ack is not None and ack.command == "lr"


def test_a_commanded_rate_survives_a_resume_and_a_new_one_wins(data: Path, tmp_path: Path) -> None:
    def drive(step: int) -> bool:
        if step == 1:
            control.send(tmp_path, "lr", 0.002)
        return step == 4

    pretrain_run.run(config(steps=50), tmp_path, data=data, stop=drive)

    def again(stop_at: int, **changes: Any) -> float:
        _, found = resume_point("auto", tmp_path)
        asked, origins = resolve(None, changes, found.values())
        new, changed = settle(found.values(), asked)
        start = pretraining.start_at(found.path, changed)
        pretrain_run.run(new, tmp_path, data=data, start=start, origins=origins, stop=lambda step: step == stop_at)
        return float(rows(tmp_path)[-1]["train/lr"])

    assert again(5) == pytest.approx(0.002)
    assert again(6, **{"optim.lr": 0.01}) == pytest.approx(0.01)  # as configured, but named
    assert again(7, **{"optim.lr": 0.004}) == pytest.approx(0.004)


def test_an_average_is_a_model_of_its_own(data: Path, tmp_path: Path) -> None:
    facts = pretrain_run.run(config(ema=0.5), tmp_path, data=data)
    raw = load_decoder(facts["checkpoint"]).state_dict()
    mean = load_decoder(Path(facts["checkpoint"]) / "ema").state_dict()
    apart = {k: float((raw[k] - mean[k]).abs().max()) for k in raw}
    assert 0 < max(apart.values()) < 0.5
