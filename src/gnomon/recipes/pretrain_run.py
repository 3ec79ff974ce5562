"""One pretraining run in its folder: corpus, tokenizer, training, checkpoints, exact resume (rows T4, T8, R1).

Everything a step sees depends on the config and the step number, so a run that was stopped and resumed has the losses
of one that was not, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from gnomon.base import checkpoint, seeds
from gnomon.base.disk import sweep
from gnomon.base.errors import CheckpointError, ConfigError, DataError
from gnomon.base.lock import RunLock
from gnomon.base.runs import Run, open_run
from gnomon.base.stopping import StopRequested, StopSignals
from gnomon.base.telemetry import Sink
from gnomon.data.corpus import Bins, BinSource, Source
from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
from gnomon.model.decoder import Decoder, DecoderConfig, preset
from gnomon.model.folder import load_decoder, save_decoder
from gnomon.reasoner import shipped
from gnomon.recipes.logic_check import logic_check
from gnomon.recipes.pretrain import CorpusConfig, Objective, mixture_of, prepare, step_losses, train_tokenizer
from gnomon.recipes.pretrain_config import CORPUS, PretrainRunConfig, data_folder
from gnomon.training import optim
from gnomon.training.ema import Ema
from gnomon.training.loop import Loss
from gnomon.training.parallel import Parallel, part_like, state_of, whole
from gnomon.training.runtime import Position, Runtime
from gnomon.training.state import gather_state, load_state, read_facts, save_state
from gnomon.training.team import ALONE, Team

EMA: Final = "ema"  # folder in a checkpoint
CHECK_PUZZLES: Final = 8
Progress = Callable[[str, int], Callable[..., object]]


@dataclass
class Start:
    """Where a run begins: at its start, or behind a checkpoint. changed: fields that differ, with their effect."""

    checkpoint: Path | None = None
    changed: Sequence[str] = ()
    skipped: Sequence[tuple[str, str]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.facts.get("step", 0))


def start_at(path: str | Path | None, changed: Sequence[str] = (), skipped: Sequence[tuple[str, str]] = ()) -> Start:
    """A Start behind the checkpoint folder `path` (None = from nothing). Raises CheckpointError when it is unusable."""
    if path is None:
        return Start()
    checkpoint.verify_folder(Path(path))
    return Start(Path(path), changed, skipped, read_facts(Path(path)))


# --- data ------------------------------------------------------------------------------------------------------------


def tokenizer_for(folder: Path, config: PretrainRunConfig, progress: Progress | None = None) -> tuple[Tokenizer, str]:
    """(tokenizer, where it came from): the data folder's, the one named in the config, the shipped one, a new one."""
    for place in (folder, Path(config.tokenizer) if config.tokenizer else None, shipped("nano")):
        if place is not None and ((place / MODEL_FILE).is_file() or str(place) == config.tokenizer):
            return Tokenizer.load(place), str(place)
    samples = min(20_000, config.corpus.records)
    count = progress("tokenizer", samples) if progress else None
    tok = train_tokenizer(config.corpus, config.vocab_size, samples)
    if count:
        count(samples)
    return tok, "trained from the corpus"


def corpus_config(folder: Path, split: str = "train") -> CorpusConfig | None:
    """How the corpus in `folder` was made; None when there is no finished one."""
    path = folder / f"{split}.json"
    if not path.is_file():
        return None
    try:
        return CorpusConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not say how the corpus was made ({error}); prepare it again") from None


def prepare_data(
    folder: Path, config: PretrainRunConfig, progress: Progress | None = None, poll: Callable[[], object] = lambda: None
) -> tuple[Tokenizer, Bins, str]:
    """The tokenizer and packed records of `folder`, generated when they are not there; and the tokenizer's origin.

    poll(): called several times a second while records are made; what it raises ends that.
    """
    mixture_of(config.corpus)  # unknown tasks and levels are refused before anything is written
    ready = corpus_config(folder, config.corpus.split)
    tok, origin = tokenizer_for(folder, config, progress)
    if ready is None:
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(folder)
        told = _to_counter(progress("corpus", config.corpus.records)) if progress else None
        prepare(folder, tok, config.corpus, config.workers, told, poll)
    return tok, Bins(folder, config.corpus.split), origin


def _to_counter(count: Callable[..., object]) -> Callable[[int], object]:
    """A counter of increments as a reporter of totals."""
    seen = 0

    def report(done: int) -> None:
        nonlocal seen
        count(done - seen)
        seen = done

    return report


def fingerprint(source: Source, tok: Tokenizer) -> str:
    """Hash of the tokenizer and the data."""
    return hashlib.blake2b(tok.model + source.fingerprint.encode(), digest_size=16).hexdigest()


# --- the run ---------------------------------------------------------------------------------------------------------


def run(
    config: PretrainRunConfig,
    folder: Path,
    *,
    data: Path | None = None,
    start: Start | None = None,
    origins: Mapping[str, str] | None = None,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
    stop: Callable[[int], bool] | None = None,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Train in `folder` until `config.steps`, SIGINT or SIGTERM; returns the facts of the run.

    data: folder of the corpus (default: the checkpoint's while it is there, else `folder`/data); stop(step): a further
    reason to stop after a step; team: every process calls this with the same arguments.
    Raises CheckpointError for a checkpoint of another tokenizer or shape, RunBusyError where another run is going on.
    """
    start = start or Start()
    if start.step > config.steps:
        raise ConfigError(f"steps = {config.steps}, but the checkpoint is behind step {start.step}; raise steps")
    if config.rows % team.size:
        raise ConfigError(f"{team.size} processes cannot share rows = {config.rows} evenly; make rows a multiple")
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        opened = None
        if team.leader:
            stack.enter_context(RunLock(folder))
            sweep(folder / "checkpoints")
            opened = open_run(folder, config, origins, seed=config.seed)
            opened.events.sinks.extend(sinks)
        try:
            facts = _run(config, folder, data, start, opened, progress, stop, team, signals)
        except StopRequested:
            facts = {"step": start.step, "steps": config.steps, "stopped": True, "loss": None, "checkpoint": None}
        except BaseException as error:
            if opened:
                opened.__exit__(type(error), error, None)
            raise
        if opened:
            opened.status("stopped" if facts["stopped"] else "done")
            opened.close()
    return {"run": str(folder), **facts}


def _run(
    config: PretrainRunConfig,
    folder: Path,
    data: Path | None,
    start: Start,
    opened: Run | None,
    progress: Progress | None,
    stop: Callable[[int], bool] | None,
    team: Team,
    signals: StopSignals,
) -> dict[str, Any]:
    def emit(name: str, /, level: Any = "info", **values: Any) -> None:
        if opened:
            opened.events.emit(name, level=level, **values)

    for name, why in start.skipped:
        emit("checkpoint/skipped", level="warning", name=name, why=why)
    if opened:
        opened.status("running", stage="data", total=config.steps, step=start.step)
    place = data or _data_of(start) or data_folder(folder, config.corpus, start.changed)
    tok, source, facts = _data(config, place, progress, team, signals)
    if opened:
        opened.write_json("data.json", facts)
    emit("data/ready", **facts)
    if start.checkpoint and start.facts.get("data") != facts["fingerprint"]:
        emit("resume/data", level="warning", what="the data differs from the checkpoint's")
    trainee = Pretraining(config, tok, source, start, team, facts, opened)
    if start.checkpoint:
        emit("resume/from", checkpoint=str(start.checkpoint), step=start.step)
        for line in start.changed:
            emit("resume/changed", what=line)
    position = Position.of(start.facts)
    if any(line.startswith("optim.lr:") for line in start.changed):
        position.lr_scale = 1.0  # who names a rate now means it, whatever commands had made of the old one
    if opened:
        opened.rewind(start.step)
        opened.status("running", stage="train")
    emit("model/ready", preset=config.model.preset, parameters=trainee.parameters, processes=team.size,
         device=str(team.device))  # fmt: skip
    if start.step >= config.steps:
        emit("train/nothing", step=start.step, steps=config.steps)
    left = config.steps - start.step
    count = progress("train", left) if progress and left else None
    runtime = Runtime(trainee, config.pace(), position, opened, signals, team, count, start.checkpoint)
    try:
        done = runtime.train(stop)
    finally:
        source.close()
    if opened:
        opened.status("running", step=done["step"], tokens=done["tokens"])
    saved = folder / "checkpoints" / f"checkpoint-{done['step']}"
    return {**done, "parameters": trainee.parameters, "checkpoint": str(saved)}


def _data_of(start: Start) -> Path | None:
    """The corpus that a checkpoint was trained on, where it still is and still wanted."""
    if any(line.startswith(CORPUS) for line in start.changed):
        return None
    place = Path(str(start.facts.get("data_folder", "")))
    return place if start.checkpoint and (place / MODEL_FILE).is_file() else None


def _data(
    config: PretrainRunConfig, place: Path, progress: Progress | None, team: Team, signals: StopSignals
) -> tuple[Tokenizer, Source, dict[str, Any]]:
    """Tokenizer, source and what is known of them; the leader makes what is missing, the others wait for it."""
    origin = ""
    stopped = False
    if team.leader:

        def poll() -> None:
            if signals.requested:
                raise StopRequested

        try:
            _, made, origin = prepare_data(place, config, progress, poll)
            made.close()
        except StopRequested:
            stopped = True
    if team.any(stopped):
        raise StopRequested
    tok = Tokenizer.load(place)
    bins = Bins(place, config.corpus.split)
    source = BinSource(bins, config.rows, config.row_length, config.seed, tok.vocab_size)
    facts = {
        "folder": str(place.resolve()),
        "fingerprint": fingerprint(source, tok),
        "tokenizer": origin,
        "records": len(bins),
        "tokens": bins.tokens,
    }
    return tok, source, facts


class Pretraining:
    """A decoder on a source of packed rows, as `Runtime` wants it."""

    def __init__(
        self, config: PretrainRunConfig, tok: Tokenizer, source: Source, start: Start, team: Team,
        data: Mapping[str, Any], run: Run | None,
    ) -> None:  # fmt: skip
        self.config, self.tok, self.source, self.team, self.data, self.run = config, tok, source, team, data, run
        self.model = self._model(start.checkpoint).to(team.device).train()
        self.model.checkpointing = config.gradient_checkpointing
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.parallel = Parallel(Objective(self.model, config.precision), self.model.blocks, team, config.parallel)
        self.network = torch.compile(self.parallel.network) if config.compile else self.parallel.network
        self.factor = self.parallel.factor
        self.micro = config.micro_rows
        self.average = Ema(self.model, config.ema) if config.ema else None
        self.optimizers = optim.build(self.model, config.optim)
        self.cursor: Mapping[str, Any] = {}
        if start.checkpoint:
            self._take_back(start.checkpoint, start.step + int(start.facts.get("passed_over", 0)))

    # --- as a Trainee ------------------------------------------------------------------------------------------------

    def losses(self, number: int) -> Iterator[Loss]:
        began = time.monotonic()
        data = self.source.step(number)
        self.cursor = data.cursor
        return step_losses(data, self.network, self.parallel, self.micro, time.monotonic() - began)

    def rate(self, fraction: float) -> float:
        return optim.schedule(self.config.optim, fraction)

    def headline_rate(self) -> float:
        return self.config.optim.lr

    def stepped(self) -> None:
        if self.average:
            self.average.update()

    def smaller(self) -> bool:
        rows = self.micro or self.config.rows
        if rows == 1 or (self.config.micro_rows or self.config.rows) != rows:
            return False  # once is enough: a second time something else is wrong
        self.micro = -(-rows // 2)
        return True

    def check(self, step: int, budget: int | None, stop: Callable[[], bool]) -> dict[str, float]:
        """Some logic puzzles, answered by the model as it stands; outputs go to samples/ and to the events."""
        state = state_of(self.model) if self.parallel.sharded else None
        if self.run is None:
            return {}
        model = self.model if state is None else _unsharded(self.model, state)
        corpus = self.config.corpus
        averaged = self.average.applied() if self.average and state is None else contextlib.nullcontext()
        with averaged:
            found = logic_check(model, self.tok, corpus.tasks, corpus.levels, CHECK_PUZZLES, budget, stop)
        if not found:
            return {}
        lines = "".join(json.dumps(f, ensure_ascii=False) + "\n" for f in found)
        (self.run.folder / "samples" / f"step-{step}.jsonl").write_text(lines, encoding="utf-8")
        right, used = sum(f["correct"] for f in found), sum(f["used"] for f in found)
        self.run.events.emit("eval/logic", step=step, correct=right, n=len(found))
        for sample in found[:3]:
            self.run.events.emit("eval/sample", step=step, sample=sample)
        return {"eval/logic_accuracy": right / len(found), "budget/used": used / len(found)}

    def gathered(self) -> dict[str, Any]:
        average = {} if self.average is None else {n: whole(v) for n, v in self.average.state_dict().items()}
        return {
            "model": state_of(self.model),
            "optimizers": gather_state(self.model, self.optimizers),
            "average": average,
        }

    def write(self, folder: Path, gathered: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Hugging Face files, tokenizer, optimiser states; with an average, ema/ is a model folder of its own."""
        tok = self.tok
        ids = {"pad": tok.pad, "bos": tok.bos, "eos": tok.eos}
        save_decoder(folder, self.model, "fp32", state=gathered["model"], **ids)
        tok.save(folder)
        if gathered["average"]:
            save_decoder(folder / EMA, self.model, "fp32", state={**gathered["model"], **gathered["average"]}, **ids)
            tok.save(folder / EMA)
        more = {
            "config": self.config.digest(),
            "data": self.data["fingerprint"],
            "data_folder": self.data["folder"],
            "cursor": dict(self.cursor),
            "processes": self.team.size,
        }
        save_state(folder, gathered["optimizers"], {**facts, **more})

    def restore(self, folder: Path | None, number: int) -> None:
        place = Start(folder).checkpoint
        fresh = self._model(place)
        current = self.model.state_dict()
        with torch.no_grad():
            for name, value in fresh.state_dict().items():
                current[name].copy_(part_like(value, current[name]))
        if place is None:
            for optimizer in self.optimizers:
                optimizer.state.clear()
            self.average = Ema(self.model, self.config.ema) if self.config.ema else None
            self.source.seek(number, {})
        else:
            self._take_back(place, number)

    def _take_back(self, folder: Path, number: int) -> None:
        """Optimisers, average and data as they were in a checkpoint."""
        facts = load_state(folder, self.model, self.optimizers)
        if self.average and (folder / EMA).is_dir():
            names = self.average.state_dict()
            saved = load_decoder(folder / EMA).state_dict()
            self.average.load_state_dict({n: part_like(saved[n], names[n]) for n in names})
        self.cursor = facts.get("cursor", {})
        self.source.seek(number, self.cursor)

    # --- the model ---------------------------------------------------------------------------------------------------

    def _model(self, at: Path | None) -> Decoder:
        config = self.config
        if at is None:
            seeds.seed_torch(config.seed, "init")
            shape = preset(config.model.preset, self.tok.vocab_size, **config.model.changes())
            return Decoder(shape) if config.init is None else self._started_from(config.init, shape)
        if Tokenizer.load(at).model != self.tok.model:
            raise CheckpointError(
                f"{at} was trained with another tokenizer than the data in {self.data['folder']}; name its corpus "
                "with --data"
            )
        return load_decoder(at)

    def _started_from(self, init: str, shape: DecoderConfig) -> Decoder:
        """The weights of another own model. Raises ConfigError where shape or tokenizer are not this run's."""
        folder = shipped(init) if init == "nano" else Path(init)
        decoder = load_decoder(folder)
        if decoder.config != shape:
            raise ConfigError(f"init {init!r} has the shape {decoder.config}, this run {shape}; name its preset")
        if Tokenizer.load(folder).model != self.tok.model:
            raise ConfigError(f"init {init!r} has another tokenizer than the data; prepare it again")
        if self.run:
            self.run.events.emit("model/init", folder=str(folder))
        return decoder


def _unsharded(model: Decoder, state: Mapping[str, torch.Tensor]) -> Decoder:
    """A decoder of this process alone with gathered weights."""
    with seeds.undisturbed():
        alone = Decoder(model.config)
    alone.load_state_dict({name: value.cpu() for name, value in state.items()})
    return alone


def estimate(config: PretrainRunConfig) -> dict[str, Any]:
    """What a run would take on this machine: a forward pass of one batch is timed and its saved tensors counted."""
    vocab = config.vocab_size
    seeds.seed_torch(config.seed, "init")
    model = Decoder(preset(config.model.preset, vocab, **config.model.changes()))
    count = sum(p.numel() for p in model.parameters())
    ids = torch.zeros(config.rows, config.row_length, dtype=torch.long)
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        model(ids)
        began = time.monotonic()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(ids)
    step = 3.0 * (time.monotonic() - began)  # backward costs about twice the forward pass
    weights = 4 * count
    return {
        "parameters": count,
        "tokens_per_step": config.rows * config.row_length,
        "tokens": config.steps * config.rows * config.row_length,
        "seconds_per_step": round(step, 3),
        "minutes": round(step * config.steps / 60, 1),
        "memory_mb": round((weights * 3.5 + sum(held.values())) / 2**20),
        "checkpoint_mb": round(weights * 2.5 / 2**20, 1),
    }
