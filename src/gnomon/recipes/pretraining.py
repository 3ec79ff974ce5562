"""The trainee of pretraining: a decoder on a source of packed rows, as `training.runtime` wants it (rows T1, T4)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from gnomon.base import checkpoint, seeds
from gnomon.base.checkpoint import load_tensors
from gnomon.base.errors import CheckpointError, ConfigError, ModelError
from gnomon.base.runs import Run
from gnomon.data.prefetch import Prefetch
from gnomon.data.tokenizer import Tokenizer
from gnomon.model.decoder import Decoder, DecoderConfig, preset
from gnomon.model.folder import WEIGHTS, check_decoder, load_decoder, save_decoder
from gnomon.reasoner import shipped
from gnomon.recipes.logic_check import logic_check
from gnomon.recipes.pretrain import Objective, step_losses
from gnomon.recipes.pretrain_config import CORPUS, PretrainRunConfig
from gnomon.training import optim
from gnomon.training.ema import Ema
from gnomon.training.loop import Loss
from gnomon.training.parallel import Parallel, part_like, state_of, whole
from gnomon.training.state import gather_state, load_state, read_facts, save_state
from gnomon.training.team import Team

EMA: Final = "ema"  # folder in a checkpoint
CHECK_PUZZLES: Final = 8


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

    @property
    def remixed(self) -> bool:
        """Whether the run goes on with another mixture than the checkpoint's."""
        return any(line.startswith(CORPUS) for line in self.changed)


def start_at(path: str | Path | None, changed: Sequence[str] = (), skipped: Sequence[tuple[str, str]] = ()) -> Start:
    """A Start behind the checkpoint folder `path` (None = from nothing). Raises CheckpointError when it is unusable."""
    if path is None:
        return Start()
    checkpoint.verify_folder(Path(path))
    return Start(Path(path), changed, skipped, read_facts(Path(path)))


def resumable(folder: Path) -> None:
    """Raise CheckpointError unless a run can go on from this checkpoint, whose files are whole."""
    read_facts(folder)
    try:
        check_decoder(folder)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    load_tensors(folder, WEIGHTS)  # refuses NaN


class Pretraining:
    """A decoder on a source of packed rows, as `Runtime` wants it."""

    def __init__(
        self, config: PretrainRunConfig, tok: Tokenizer, source: Prefetch, start: Start, team: Team,
        data: Mapping[str, Any], run: Run | None,
    ) -> None:  # fmt: skip
        self.config, self.tok, self.source, self.team, self.data, self.run = config, tok, source, team, data, run
        self.model = self._model(start.checkpoint).to(team.device).train()
        self.model.checkpointing = config.gradient_checkpointing
        self.parameters = sum(p.numel() for p in self.model.parameters())
        objective = Objective(self.model, config.precision, config.compile)
        self.parallel = Parallel(objective, self.model.blocks, team, config.parallel)
        self.factor = self.parallel.factor
        self.micro = config.micro_rows
        self.average = Ema(self.model, config.ema) if config.ema else None
        self.optimizers = optim.build(self.model, config.optim)
        self.cursor: Mapping[str, Any] = {}
        self.counts: Mapping[str, float] = {}
        if start.checkpoint:
            self._take_back(start.checkpoint)

    # --- as a Trainee ------------------------------------------------------------------------------------------------

    def losses(self, number: int) -> Iterator[Loss]:
        data = self.source.step(number)
        self.cursor = data.cursor
        self.counts = data.counts
        return step_losses(data, self.parallel, self.micro, self.source.wait_seconds, self.source.prepared)

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
        self.run.sample(step, found)
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

    def check_folder(self, folder: Path) -> None:
        resumable(folder)

    def restore(self, folder: Path | None) -> None:
        fresh = self._model(folder)
        current = self.model.state_dict()
        with torch.no_grad():
            for name, value in fresh.state_dict().items():
                current[name].copy_(part_like(value, current[name]))
        if folder is None:
            for optimizer in self.optimizers:
                optimizer.state.clear()
            self.average = Ema(self.model, self.config.ema) if self.config.ema else None
            self.cursor = {}
            self.source.seek(0, {})
        else:
            self._take_back(folder)

    def _take_back(self, folder: Path) -> None:
        """Optimisers, average and data as in a checkpoint; what is passed over behind it, the source draws."""
        facts = load_state(folder, self.model, self.optimizers)
        if self.average and (folder / EMA).is_dir():
            names = self.average.state_dict()
            saved = load_decoder(folder / EMA).state_dict()
            self.average.load_state_dict({n: part_like(saved[n], names[n]) for n in names})
        self.cursor = facts.get("cursor", {})
        self.source.seek(int(facts["step"]) + int(facts.get("passed_over", 0)), self.cursor)

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
