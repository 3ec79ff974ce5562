"""One pretraining run in its folder: corpus, tokenizer, training, checkpoints, exact resume (rows T4, T8, R1).

Everything a step sees depends on the config and the step number, so a run that was stopped and resumed has the losses
of one that was not, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from gnomon.base import checkpoint, seeds
from gnomon.base.errors import CheckpointError, ConfigError, DataError
from gnomon.base.runs import Run, copy_provenance, open_run
from gnomon.base.stopping import StopSignals
from gnomon.base.telemetry import Sink
from gnomon.data.corpus import Bins
from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
from gnomon.model.decoder import Decoder, DecoderConfig, preset
from gnomon.model.folder import load_decoder, save_decoder
from gnomon.reasoner import shipped
from gnomon.recipes.logic_check import logic_check
from gnomon.recipes.pretrain import CorpusConfig, mixture_of, prepare, pretrain, train_tokenizer
from gnomon.recipes.pretrain_config import PretrainRunConfig
from gnomon.training import optim
from gnomon.training.state import load_state, read_facts, save_state

STATUS_EVERY: Final = 2.0  # seconds between two writes of status.json
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


def start_at(path: Path | None, changed: Sequence[str] = (), skipped: Sequence[tuple[str, str]] = ()) -> Start:
    """A Start behind the checkpoint folder `path` (None = from nothing). Raises CheckpointError when it is unusable."""
    if path is None:
        return Start()
    checkpoint.verify_folder(path)
    return Start(path, changed, skipped, read_facts(path))


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
    folder: Path, config: PretrainRunConfig, progress: Progress | None = None
) -> tuple[Tokenizer, Bins, str]:
    """The tokenizer and packed records of `folder`, generated when they are not there; and the tokenizer's origin."""
    mixture_of(config.corpus)  # unknown tasks and levels are refused before anything is written
    ready = corpus_config(folder, config.corpus.split)
    tok, origin = tokenizer_for(folder, config, progress)
    if ready is None:
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(folder)
        told = _to_counter(progress("corpus", config.corpus.records)) if progress else None
        prepare(folder, tok, config.corpus, config.workers, told)
    return tok, Bins(folder, config.corpus.split), origin


def _to_counter(count: Callable[..., object]) -> Callable[[int], object]:
    """A counter of increments as a reporter of totals."""
    seen = 0

    def report(done: int) -> None:
        nonlocal seen
        count(done - seen)
        seen = done

    return report


def fingerprint(bins: Bins, tok: Tokenizer) -> str:
    """Hash of the tokenizer and the data."""
    return hashlib.blake2b(tok.model + bins.fingerprint().encode(), digest_size=16).hexdigest()


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
) -> dict[str, Any]:
    """Train in `folder` until `config.steps`, SIGINT or SIGTERM; returns the facts of the run.

    data: folder of the corpus (default: the checkpoint's while it is there, else `folder`/data);
    stop(step): a further reason to stop after a step.
    Raises CheckpointError for a checkpoint of another tokenizer or shape.
    """
    start = start or Start()
    if start.step > config.steps:
        raise ConfigError(f"steps = {config.steps}, but the checkpoint is behind step {start.step}; raise steps")
    opened = open_run(folder, config, origins, seed=config.seed)
    opened.events.sinks.extend(sinks)
    try:
        work = _Work(opened, config, data or _data_of(start) or folder / "data", start, progress)
        facts = work.train(stop)
    except BaseException as error:
        opened.__exit__(type(error), error, None)
        raise
    opened.status("stopped" if facts["stopped"] else "done")
    opened.close()
    return facts


def _data_of(start: Start) -> Path | None:
    """The corpus that a checkpoint was trained on, where it still is."""
    place = Path(str(start.facts.get("data_folder", "")))
    return place if start.checkpoint and (place / MODEL_FILE).is_file() else None


class _Work:
    """A run in progress: what on_step needs to log, check and save."""

    def __init__(self, run: Run, config: PretrainRunConfig, data: Path, start: Start, progress: Progress | None):
        self.run, self.config, self.data, self.start, self.progress = run, config, data, start, progress
        emit = run.events.emit
        for name, why in start.skipped:
            emit("checkpoint/skipped", level="warning", name=name, why=why)
        run.status("running", stage="data", total=config.steps, step=start.step)
        self.tok, self.bins, origin = prepare_data(data, config, progress)
        self.print = fingerprint(self.bins, self.tok)
        run.write_json("data.json", {"folder": str(data.resolve()), "fingerprint": self.print, "tokenizer": origin})
        emit("data/ready", folder=str(data), records=len(self.bins), tokens=self.bins.tokens, tokenizer=origin)
        self.model = self._model()
        self.optimizers = optim.build(self.model, config.optim)
        if start.checkpoint:
            load_state(start.checkpoint, self.model, self.optimizers)
            emit("resume/from", checkpoint=str(start.checkpoint), step=start.step)
            for line in start.changed:
                emit("resume/changed", what=line)
        _rewind(run, start.step)
        count = sum(p.numel() for p in self.model.parameters())
        emit("model/ready", preset=config.model.preset, parameters=count)
        self.tokens = int(start.facts.get("tokens", 0))
        self.parameters, self.saved_at, self.told_at = count, -1, 0.0

    def _model(self) -> Decoder:
        config, at = self.config, self.start.checkpoint
        if at is None:
            seeds.seed_torch(config.seed, "init")
            shape = preset(config.model.preset, self.tok.vocab_size, **config.model.changes())
            return Decoder(shape) if config.init is None else self._started_from(config.init, shape)
        if Tokenizer.load(at).model != self.tok.model:
            raise CheckpointError(
                f"{at} was trained with another tokenizer than the corpus in {self.data}; name its corpus with --data"
            )
        if self.start.facts.get("data") != self.print:
            self.run.events.emit("resume/data", level="warning", what="the corpus differs from the checkpoint's")
        return load_decoder(at).train()

    def _started_from(self, init: str, shape: DecoderConfig) -> Decoder:
        """The weights of another own model. Raises ConfigError where shape or tokenizer are not this run's."""
        folder = shipped(init) if init == "nano" else Path(init)
        decoder = load_decoder(folder).train()
        if decoder.config != shape:
            raise ConfigError(f"init {init!r} has the shape {decoder.config}, this run {shape}; name its preset")
        if Tokenizer.load(folder).model != self.tok.model:
            raise ConfigError(f"init {init!r} has another tokenizer than the corpus in {self.data}; prepare it again")
        self.run.events.emit("model/init", folder=str(folder))
        return decoder

    def train(self, stop: Callable[[int], bool] | None) -> dict[str, Any]:
        """Run the loop; the last step is always saved."""
        config, start = self.config, self.start
        self.run.status("running", stage="train")
        self.clock = time.monotonic()
        left = config.steps - start.step
        self.count = self.progress("train", left) if self.progress and left else None
        if start.step >= config.steps:
            self.run.events.emit("train/nothing", step=start.step, steps=config.steps)
        with StopSignals() as signals:

            def on_step(step: int, row: dict[str, Any]) -> bool:
                self.after(step, row)
                return signals.requested or (stop is not None and stop(step))

            done = pretrain(
                self.model,
                self.bins,
                config.pretraining(),
                optimizers=self.optimizers,
                start=start.step,
                on_step=on_step,
            )
            if done["steps"] > start.step and self.saved_at != done["steps"]:
                self.save(done["steps"])
        stopped = bool(done["stopped"]) and done["steps"] < config.steps
        self.run.status("running", step=done["steps"], tokens=self.tokens)
        return {
            "run": str(self.run.folder),
            "step": done["steps"],
            "steps": config.steps,
            "stopped": stopped,
            "loss": done["last"].get("loss"),
            "tokens": self.tokens,
            "seconds": done["seconds"],
            "skipped": done["skipped"],
            "parameters": self.parameters,
            "checkpoint": str(self.run.checkpoints / f"checkpoint-{done['steps']}"),
        }

    def after(self, step: int, row: dict[str, Any]) -> None:
        """Log a step; check and save on schedule."""
        now = time.monotonic()
        rate, self.clock = row["tokens"] / max(now - self.clock, 1e-9), now
        self.tokens += int(row["tokens"])
        names = {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "skipped": "train/skipped"}
        values = {"tokens": self.tokens, **{to: row[k] for k, to in names.items()}, "train/tok_per_sec": rate}
        if step % self.config.eval_every == 0 or step == self.config.steps:
            values |= self.check(step)
        self.run.row(step, **values)
        if step % self.config.save_every == 0:
            self.save(step)
        if self.count:
            self.count(1, f"loss {row['loss']:.3f}  {rate:,.0f} tok/s")
        if now - self.told_at > STATUS_EVERY:
            self.told_at = now
            self.run.status("running", step=step, tokens=self.tokens, loss=row["loss"])
        self.clock = time.monotonic()  # checks and saving are no training time

    def check(self, step: int) -> dict[str, float]:
        """Some logic puzzles, answered by the model as it stands; outputs go to samples/ and to the events."""
        corpus = self.config.corpus
        found = logic_check(self.model, self.tok, corpus.tasks, corpus.levels, CHECK_PUZZLES)
        lines = "".join(json.dumps(f, ensure_ascii=False) + "\n" for f in found)
        (self.run.folder / "samples" / f"step-{step}.jsonl").write_text(lines, encoding="utf-8")
        share = sum(f["correct"] for f in found) / len(found)
        self.run.events.emit("eval/logic", step=step, correct=sum(f["correct"] for f in found), n=len(found))
        for sample in found[:3]:
            self.run.events.emit("eval/sample", step=step, sample=sample)
        return {"eval/logic_accuracy": share}

    def save(self, step: int) -> None:
        """Publish checkpoint-<step>: Hugging Face files, tokenizer, optimiser states, provenance, manifest."""
        with checkpoint.publish(self.run.checkpoints, step) as folder:
            tok = self.tok
            save_decoder(folder, self.model, "fp32", pad=tok.pad, bos=tok.bos, eos=tok.eos)
            tok.save(folder)
            facts = {"step": step, "tokens": self.tokens, "config": self.config.digest(), "data": self.print}
            save_state(folder, self.model, self.optimizers, {**facts, "data_folder": str(self.data.resolve())})
            copy_provenance(self.run.folder, folder)
        self.saved_at = step
        self.run.status("running", step=step, checkpoint=f"checkpoint-{step}")
        self.run.events.emit("checkpoint/saved", step=step, name=f"checkpoint-{step}")
        checkpoint.prune(self.run.checkpoints, self.config.keep)


def _rewind(run: Run, step: int) -> None:
    """Drop metrics rows behind `step`: they belong to a future that a crash or a stop has undone."""
    path = run.folder / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["step"] <= step]
    if len(kept) < len(rows):
        run.metrics.close()
        path.write_bytes(b"".join(kept))
        run.metrics = type(run.metrics)(path)


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
