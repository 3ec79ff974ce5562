"""`train pretrain` and `train metacog`."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gnomon.base.atomic import FULL, disk_error
from gnomon.base.errors import CheckpointError
from gnomon.interfaces import console, options

if TYPE_CHECKING:
    from gnomon.base.runs import Run

Flag = Parameter(negative=())
Rest = Parameter(allow_leading_hyphen=True, show=False)
ALIASES = {"preset": "model.preset", "tasks": "corpus.tasks", "levels": "corpus.levels", "lr": "optim.lr"}


def pretrain(
    *overrides: Annotated[str, Rest],
    run: Annotated[Path | None, Parameter(name=("--run", "--run-dir"))] = None,
    data: Path | None = None,
    config: Path | None = None,
    resume: str | None = None,
    runs: Path = Path("runs"),
    dry_run: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Train an own model on the built-in mixture. Any field of its config is an option.

    For example: --model.preset micro --steps 500 --save-every 100 --seed mine --optim.lr 0.01 --corpus.tasks sort,count

    Args:
        run: Run folder; by default a new one under --runs. Under torchrun write --run-dir: it takes --run for its own.
        data: Folder of a packed corpus (`gnomon data prepare`); by default RUN/data, made when it is missing.
        config: A YAML or TOML file with fields.
        resume: auto (newest good checkpoint of the run), a run folder, or a checkpoint folder.
        runs: Where new run folders are made.
        dry_run: Print every value and an estimate of time and memory; train nothing.
        json: Print one JSON object with the facts of the run.
    """
    from gnomon.recipes import pretrain_config as pc
    from gnomon.recipes import pretrain_run as pr
    from gnomon.recipes.pretraining import start_at
    from gnomon.training.team import joined

    flags = ("run", "run-dir", "data", "config", "resume", "runs", "dry-run", "json")
    given = options.overrides(pc.PretrainRunConfig, overrides, flags, ALIASES)
    folder, found = pc.resume_point(resume, run, _latest(runs, given.get("model.preset")))
    old = found.values()
    settled, origins = pc.resolve(config, given, old)
    changed: list[str] = []
    if found.path is not None:
        settled, changed = pc.settle(old, settled)
    if dry_run:
        _dry_run(settled, folder or runs, json)
        return
    with joined(settled.device) as team:
        # One process decides where the run is and what it goes on from: another may see the disk a moment later.
        place = Path(team.tell(str(folder or _new_run("pretrain", settled, runs)) if team.leader else ""))
        start = start_at(*team.tell([found.path and str(found.path), changed, found.skipped]))
        console.on_interrupt(f"go on with: gnomon train pretrain --run {place} --resume auto")
        with console.Stages() as stages:
            facts = pr.run(
                settled,
                place,
                data=data,
                start=start,
                origins=origins,
                sinks=[console.Narrator()],  # the leader's events
                progress=stages if team.leader else None,
                team=team,
            )
    if team.leader:
        _tell_pretrained(facts, place, json)


def _tell_pretrained(facts: Mapping[str, Any], place: Path, json: bool) -> None:
    """How a pretraining run ended, and how to go on."""
    if json:
        console.emit_json(facts)
    elif facts["stopped"]:
        saved = f", saved in {facts['checkpoint']}" if facts["checkpoint"] else ""
        console.say(f"stopped behind step {facts['step']}{saved}")
        console.say(f"go on with: gnomon train pretrain --run {place} --resume auto")
    else:
        console.say(f"done: {facts['checkpoint']}")


def _dry_run(settled: Any, place: Path, json: bool) -> None:
    """Every value, no `auto` left, and what the run would take."""
    from gnomon.base import config as configs
    from gnomon.recipes.pretrain_run import estimate

    facts = {"config": configs.dump(settled), "estimate": estimate(settled, place)}
    if json:
        console.emit_json(facts)
    else:
        console.say(configs.dump_yaml(settled))
        console.table("estimate", ("what", "value"), list(facts["estimate"].items()))


def _latest(root: Path, preset: str | None) -> Path | None:
    """The newest pretraining run under `root`, of this preset when one is named."""
    from gnomon.base.config import read_file

    files = sorted(root.glob("pretrain-*/resolved.yaml"), key=lambda p: p.stat().st_mtime, reverse=True)
    fitting = (f.parent for f in files if preset is None or read_file(f).get("model", {}).get("preset") == preset)
    return next(fitting, None)


def _new_run(name: str, config: Any, root: Path) -> Path:
    from gnomon.base.runs import create_run

    opened = create_run(name, config, root=root, seed=config.seed)
    opened.close()
    return opened.folder


_METACOG_FLAGS = ("base", "device", "run", "config", "runs", "dry-run", "json")
_CANNOT_WRITE = (*FULL, errno.EROFS)


def _go_on(place: Path | None) -> str:
    """What a stopped run of the layer leaves."""
    return "finished rollouts are kept; go on with the same command" + ("" if place is None else f" and --run {place}")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does. Nothing waits for a step: files are written whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former if former is not None else signal.SIG_DFL)


@contextmanager
def _run_of_layer(settled: Any, origins: dict[str, str], run: Path | None, runs: Path) -> Iterator[Run]:
    """The open run folder; signals and disks that fail say how to go on."""
    from gnomon.base.runs import create_run, open_run

    place = run
    try:
        with _terminable():
            if place is None:
                opened = create_run("metacog", settled, root=runs, origins=origins, seed=settled.seed)
            else:
                opened = open_run(place, settled, origins=origins, seed=settled.seed)
                os.truncate(place / "metrics.jsonl", 0)  # the heads are fitted from their first step again
            place = opened.folder
            with opened:
                yield opened
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        told = disk_error(error, "the run cannot be written")
        raise type(told)(f"{told}; {_go_on(place)}") from None
    except CheckpointError as error:
        raise type(error)(f"{error}; {_go_on(place)}") from None


def metacog(
    *overrides: Annotated[str, Rest],
    base: str | None = None,
    device: str | None = None,
    run: Path | None = None,
    config: Path | None = None,
    runs: Path = Path("runs"),
    dry_run: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Label by sampling, fit heads, calibrate, evaluate, sweep, report. Any field of its config is an option.

    For example: --base smollm2 --tasks gym:chain_sum,gym:letter_counting --label-n 300

    Args:
        base: A shipped model, smollm2, or a local model folder; by default what --config says, else nano.
        device: auto, cpu or cuda: where base and training compute; by default what --config says, else cpu.
        run: Run folder; one that was stopped goes on with the rollouts that it has finished.
        config: A YAML or TOML file with fields.
        runs: Where a new run folder is made; RUN/model is then a model that every verb takes.
        dry_run: Print every value; run nothing.
        json: Print one JSON object with everything measured.
    """
    from gnomon.base import config as configs
    from gnomon.recipes.metacog import MetacogRunConfig, defaults_for

    given = options.overrides(MetacogRunConfig, overrides, _METACOG_FLAGS)
    given |= {name: value for name, value in (("base", base), ("device", device)) if value is not None}
    written = configs.read_file(config) if config is not None else {}
    name = str(given.get("base") or written.get("base") or "nano")
    settled, origins = configs.resolve(MetacogRunConfig, config, given, defaults_for(name))
    options.check_draw(settled.tasks, "train", settled.label_n, settled.levels)
    if settled.device != "cpu":
        from gnomon.model.device import resolve

        settled = settled.model_copy(update={"device": str(resolve(settled.device))})
    if dry_run:
        console.emit_json(configs.dump(settled)) if json else console.say(configs.dump_yaml(settled))
        return
    from gnomon.recipes import claims
    from gnomon.recipes.metacog import run_metacog

    folder = run
    try:
        with _run_of_layer(settled, origins, run, runs) as opened:
            folder = opened.folder
            outcome = run_metacog(settled, opened)
            page = claims.write(outcome, settled, folder, f"gnomon: {settled.base}")
    except KeyboardInterrupt:
        console.say(f"\nstopped: {_go_on(folder)}")
        if json:
            console.emit_json({"run": str(folder), "stopped": True})
        return
    assert folder is not None
    if json:
        console.emit_json({"run": str(folder), "summary": outcome.summary, "seconds": outcome.seconds})
        return
    console.table("What this run shows", claims.COLUMNS, claims.claims(outcome))
    lacks = "".join(f"{lack}\n" for lack in (outcome.trained.card_report["running"] or {}).get("missing", ()))
    console.say(f"{lacks}model:  {folder / 'model'}\nreport: {page}")
