"""One pretraining run in its folder: corpus, tokenizer, training, checkpoints, exact resume (rows T4, T8, R1).

Everything a step sees depends on the config and the step number, so a run that was stopped and resumed has the losses
of one that was not, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gnomon.base import seeds
from gnomon.base.control import ControlReader
from gnomon.base.disk import prune, sweep
from gnomon.base.errors import ConfigError, DataError
from gnomon.base.lock import RunLock
from gnomon.base.runs import Run, open_run
from gnomon.base.stopping import StopRequested, StopSignals
from gnomon.base.telemetry import Sink
from gnomon.data.corpus import Bins, BinSource, Source, collate
from gnomon.data.encode import Encoded
from gnomon.data.prefetch import Prefetch
from gnomon.data.stream import text_files, text_source
from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
from gnomon.model.decoder import Decoder, preset
from gnomon.model.device import resolve
from gnomon.reasoner import shipped
from gnomon.recipes.pretrain import CorpusConfig, Objective, mixture_of, prepare, record, train_tokenizer
from gnomon.recipes.pretrain_config import CORPUS, PretrainRunConfig, data_folder, given
from gnomon.recipes.pretraining import Pretraining, Start
from gnomon.training import estimate as estimates
from gnomon.training import optim
from gnomon.training.runtime import Position, Runtime
from gnomon.training.team import ALONE, Team

Progress = Callable[[str, int], Callable[..., object]]


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
    if config.text.given:
        text_files(config.text)  # missing ones are named before there is a run folder
    place, config = _records(config, folder, data, start, origins or {}, team)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        opened = commands = None
        if team.leader:
            stack.enter_context(RunLock(folder))
            commands = ControlReader(folder)  # from here on they are heard, whatever else is being done
            sweep(folder)
            sweep(folder / "checkpoints")
            prune(
                folder / "checkpoints",
                config.keep,
                config.keep_every,
                protect=[start.checkpoint] if start.checkpoint else [],
            )
            opened = open_run(folder, config, origins, seed=config.seed)
            opened.events.sinks.extend(sinks)
            opened.track(config.track, config.model_dump(mode="json"), start.step)
        try:
            facts = _run(config, folder, place, start, origins or {}, opened, commands, progress, stop, team, signals)
        except StopRequested:
            facts = {"step": start.step, "steps": config.steps, "stopped": True, "loss": None, "checkpoint": None}
        except BaseException as error:
            if opened:
                with contextlib.suppress(OSError):  # the disk may be why; the error itself says more
                    opened.__exit__(type(error), error, None)
            raise
        if opened:
            opened.status("stopped" if facts["stopped"] else "done")
            opened.close()
    return {"run": str(folder), **facts}


def _run(
    config: PretrainRunConfig,
    folder: Path,
    place: Path,
    start: Start,
    origins: Mapping[str, str],
    opened: Run | None,
    commands: ControlReader | None,
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
    if config.text.given:
        tok, plain, facts = _text(config, folder, start.checkpoint, team)
    else:
        tok, plain, facts = _data(config, place, progress, team, signals)
    stopper = (lambda: signals.requested) if team.size == 1 else None
    source = Prefetch(plain, start.step, prepare=lambda d: collate(team.share(d.rows), d.length), stop=stopper)
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
    if start.checkpoint and given("optim.lr", origins) and position.lr_scale != 1.0:
        # Who names a rate now means it, whatever commands and roll-backs had made of the old one.
        emit("resume/changed", what=f"learning rate: {position.lr_scale:g} times the configured one -> as given")
        position.lr_scale = 1.0
    if opened:
        opened.rewind(start.step)
        opened.status("running", stage="train")
    shape = {"preset": config.model.preset, "parameters": trainee.parameters}
    emit("model/ready", **shape, processes=team.size, device=str(team.device))
    if start.step >= config.steps:
        emit("train/nothing", step=start.step, steps=config.steps)
    left = config.steps - start.step
    count = progress("train", left) if progress and left else None
    runtime = Runtime(trainee, config.pace(), position, opened, commands, signals, team, count, start.checkpoint)
    try:
        done = runtime.train(stop)
    finally:
        source.close()
    if opened:
        opened.status("running", step=done["step"], tokens=done["tokens"])
    saved = folder / "checkpoints" / f"checkpoint-{done['step']}"
    return {**done, "parameters": trainee.parameters, "checkpoint": str(saved)}


def _records(
    config: PretrainRunConfig, folder: Path, data: Path | None, start: Start, origins: Mapping[str, str], team: Team
) -> tuple[Path, PretrainRunConfig]:
    """(folder of the records, config with the mixture that they have); the leader looks, all agree.

    Raises ConfigError when a mixture is asked for that the named records do not have.
    """
    if config.text.given:
        return folder / "data", config
    place = data or _data_of(start) or data_folder(folder, config.corpus, start.remixed)
    ready = corpus_config(place, config.corpus.split) if team.leader else None
    if ready is not None and ready != config.corpus:
        if place == folder / "data":
            place = data_folder(folder, config.corpus, remixed=True)
            ready = None
        else:
            old, new = ready.model_dump(), config.corpus.model_dump()
            asked = [k for k in new if old[k] != new[k] and given(CORPUS + k, origins)]
            if asked:
                raise ConfigError(
                    f"the records in {place} have {asked[0]} = {old[asked[0]]!r}, you ask for {new[asked[0]]!r}; leave "
                    f"--corpus.{asked[0]} out, or name another --data"
                )
    found = team.tell([str(place), None if ready is None else ready.model_dump(mode="json")])
    if found[1] is not None:
        config = config.model_copy(update={"corpus": CorpusConfig.model_validate(found[1])})
    return Path(found[0]), config


def _data_of(start: Start) -> Path | None:
    """The corpus that a checkpoint was trained on, where it still is and still wanted."""
    place = Path(str(start.facts.get("data_folder", "")))
    return place if start.checkpoint and not start.remixed and (place / MODEL_FILE).is_file() else None


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
    facts = {"folder": str(place.resolve()), "tokenizer": origin, "records": len(bins), "tokens": bins.tokens}
    return tok, source, {**facts, "fingerprint": fingerprint(source, tok)}


def _text(
    config: PretrainRunConfig, folder: Path, origin_of: Path | None, team: Team
) -> tuple[Tokenizer, Source, dict[str, Any]]:
    """Tokenizer and source of a run on text; nothing is written but the rows that are refused."""
    tok, origin = tokenizer_for(origin_of or folder / "data", config)
    mixture = mixture_of(config.corpus)

    def task(index: int) -> Encoded:
        return record(tok, mixture, config.corpus, index)

    quarantine = folder / "quarantine.jsonl" if team.leader else None
    context = config.model.size("context", 512)
    marks = json.dumps(config.corpus.model_dump(mode="json"), sort_keys=True)
    source = text_source(config.text, tok, config.rows, context, config.seed, task, quarantine, marks)
    facts = {"folder": config.text.dataset or ", ".join(config.text.files), "tokenizer": origin}
    return tok, source, {**facts, "fingerprint": fingerprint(source, tok)}


def estimate(config: PretrainRunConfig, folder: Path = Path("."), seconds: float = 10.0) -> dict[str, Any]:
    """What a run would take on this machine: memory, disk, time, and what of it does not fit; `training.estimate`."""
    device = resolve(config.device)
    length = config.text.max_len if config.text.given and isinstance(config.text.max_len, int) else config.row_length
    shape = preset(config.model.preset, config.vocab_size, **config.model.changes())

    def objective(shaped: bool = False) -> Objective:
        with seeds.undisturbed():
            decoder = Decoder(shape)
        decoder.checkpointing = config.gradient_checkpointing
        return Objective(decoder, config.precision, shaped=shaped)

    return estimates.estimate(
        objective,
        lambda module: optim.build(module.decoder, config.optim),  # type: ignore[arg-type]
        rows=config.rows,
        length=length,
        vocab=config.vocab_size,
        steps=config.steps,
        world=int(os.environ.get("WORLD_SIZE", "1")),
        parallel=config.parallel,
        micro_rows=config.micro_rows,
        blocks=lambda module: module.decoder.blocks,  # type: ignore[union-attr, return-value]
        average=config.ema > 0,
        checkpoints=config.keep,
        shaped=lambda: objective(shaped=True),
        folder=folder,
        seconds=seconds,
        device=device,
    )
