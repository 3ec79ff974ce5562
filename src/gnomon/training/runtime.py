"""A training run that can be trusted overnight: checkpoints, roll-back, signals, commands, metrics, on any team.

The recipe is a `Trainee`: it makes losses, says what a checkpoint holds and how it is taken back. `Runtime` owns when.
One process, the leader, writes and reads files; what all must know it tells.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from gnomon.base import checkpoint
from gnomon.base.atomic import FULL, disk_error
from gnomon.base.control import ACK, Ack, Command, ControlReader, Rejected
from gnomon.base.disk import Ballast
from gnomon.base.errors import CheckpointError, DiskFullError, GnomonError, ModelError, NotFiniteError
from gnomon.base.folders import size_of
from gnomon.base.runs import Run, copy_provenance
from gnomon.base.stopping import StopRequested, StopSignals
from gnomon.base.telemetry import live_note
from gnomon.training.loop import DivergedError, Loss, OutOfMemory, Patience, UnstableError, fit
from gnomon.training.state import read_facts
from gnomon.training.team import ALONE, Team

STATUS_EVERY: Final = 2.0  # seconds between two writes of status.json
PAUSE: Final = 0.2  # seconds between two looks at the commands while paused
ROLL_BACKS: Final = 2
# reliability.md C2: three bad steps in a row, or more than 1 % of 500, and the run goes back to its last checkpoint.
PATIENCE: Final = Patience(in_a_row=3, share=0.01, window=500)
NAMES: Final = {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm"}


@dataclass(frozen=True)
class Pace:
    """When things happen, in optimiser steps. keep: newest checkpoints that stay, with every `keep_every`-th one."""

    steps: int
    save_every: int = 1000
    eval_every: int = 100
    keep: int = 3
    keep_every: int | None = None
    clip: float | None = 1.0


@dataclass
class Position:
    """Where a run stands; part of every checkpoint.

    passed_over: steps of data that roll-backs have left out. lr_scale: what commands and roll-backs have made of the
    configured rate. budget: think tokens of the small evaluation, None = what the recipe says.
    """

    step: int = 0
    tokens: int = 0
    passed_over: int = 0
    lr_scale: float = 1.0
    roll_backs: int = 0
    skipped: int = 0
    budget: int | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Position:
        """From a checkpoint's facts."""
        return cls(**{f.name: facts[f.name] for f in fields(cls) if f.name in facts})


class Trainee(Protocol):
    """What a recipe gives. `number` counts steps of data: the step plus what was passed over."""

    optimizers: list[torch.optim.Optimizer]
    factor: float
    counts: Mapping[str, float]  # of the data so far, for the metrics

    def losses(self, number: int) -> Iterable[Loss]:
        """Micro-batches of a step on this process; parts: `tokens`, and `data/wait` in seconds."""

    def rate(self, fraction: float) -> float:
        """Share of training done -> factor on every learning rate."""

    def headline_rate(self) -> float:
        """The configured learning rate that a command replaces; the others keep their ratio to it."""

    def stepped(self) -> None:
        """The optimisers have stepped."""

    def check(self, step: int, budget: int | None, stop: Callable[[], bool]) -> dict[str, float]:
        """The small evaluation, for the metrics; called on every process."""

    def gathered(self) -> Any:
        """What `write` needs, from every process."""

    def write(self, folder: Path, gathered: Any, facts: Mapping[str, Any]) -> None:
        """Everything of a checkpoint; leader only. facts: go into state.json."""

    def check_folder(self, folder: Path) -> None:
        """Raise CheckpointError unless `restore` can take this checkpoint."""

    def restore(self, folder: Path | None) -> None:
        """Back to a checkpoint with its place in the data, or to before the first step."""

    def smaller(self) -> bool:
        """A micro-batch did not fit: make them smaller. False when they cannot be."""


class Runtime:
    """One run of a trainee. run, commands: the leader's open folder and its control file, None elsewhere.

    count(1, note): advances a progress bar. source_checkpoint: the one resumed from, which stays.
    """

    def __init__(
        self,
        trainee: Trainee,
        pace: Pace,
        position: Position,
        run: Run | None,
        commands: ControlReader | None,
        signals: StopSignals,
        team: Team = ALONE,
        count: Callable[..., object] | None = None,
        source_checkpoint: Path | None = None,
    ) -> None:
        self.trainee, self.pace, self.at, self.run, self.team = trainee, pace, position, run, team
        self.signals, self.count = signals, count
        self.protected = {source_checkpoint.name} if source_checkpoint else set()
        self.commands = commands
        self.ballast = Ballast(run.checkpoints) if run else None
        self.saved_at, self.told_at, self.skipped_before = position.step, 0.0, position.skipped
        self.paused = self.asked_to_stop = False
        self.undo: list[tuple[float, int | None]] = []
        self.clock = time.monotonic()

    # --- stepping ----------------------------------------------------------------------------------------------------

    def train(self, stop: Callable[[int], bool] | None = None) -> dict[str, Any]:
        """Run until the last step, a signal, a command or `stop(step)`; the last state is always saved.

        Returns {step, steps, stopped, loss, tokens, seconds, skipped, roll_backs}. Raises DivergedError after the
        second roll-back, OutOfMemory, DiskFullError.
        """
        with self.ballast or contextlib.nullcontext():
            return self._train(stop)

    def _train(self, stop: Callable[[int], bool] | None) -> dict[str, Any]:
        began, first = time.monotonic(), self.at.step
        last: dict[str, Any] = {}
        self.clock = time.monotonic()
        while True:
            try:
                with contextlib.suppress(StopRequested):  # a signal, while the next step's data did not come
                    last = self._fit(stop)
                if self.at.step > self.saved_at:
                    self.save(last=True)
                break
            except UnstableError as error:
                self._roll_back(error)
            except OutOfMemory:
                if self.team.size == 1 and self.at.step > self.saved_at:
                    self.save()
                raise
            except OSError as error:  # a row or an event did not reach the disk
                if error.errno not in FULL:
                    raise
                raise self._disk_full(disk_error(error, f"step {self.at.step} cannot be logged")) from error
        done = self.at.step
        return {
            "step": done,
            "steps": self.pace.steps,
            "stopped": done < self.pace.steps,
            "loss": last.get("loss"),
            "tokens": self.at.tokens,
            "seconds": time.monotonic() - began,
            "trained": done - first,
            "skipped": self.at.skipped,
            "roll_backs": self.at.roll_backs,
        }

    def _fit(self, stop: Callable[[int], bool] | None) -> dict[str, Any]:
        result = fit(
            lambda step: self.trainee.losses(step + self.at.passed_over),
            self.trainee.optimizers,
            self.pace.steps,
            schedule=lambda fraction: self.trainee.rate(fraction) * self.at.lr_scale,
            clip=self.pace.clip,
            start=self.at.step,
            on_step=lambda step, row: self._after(step, row, stop),
            on_memory=self._on_memory,
            patience=PATIENCE,
            team=self.team,
            factor=self.trainee.factor,
        )
        return dict(result["last"])

    def _after(self, step: int, row: dict[str, Any], stop: Callable[[int], bool] | None) -> bool:
        """Log a step; check and save on schedule; do what was asked."""
        at, pace = self.at, self.pace
        now = time.monotonic()
        seconds = max(now - self.clock, 1e-9)
        at.step, at.tokens = step, at.tokens + int(row["tokens"])
        at.skipped = self.skipped_before + int(row["skipped"])
        if good := math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.trainee.stepped()
        wait = row.get("data/wait", 0.0) / self.team.size
        values = {
            "tokens": at.tokens,
            **{to: row[name] for name, to in NAMES.items()},
            "train/skipped": at.skipped,
            "train/tok_per_sec": row["tokens"] / seconds,
            "data/wait_share": wait / seconds,
            **{k: v for k, v in row.items() if "/" in k and k != "data/wait"},
            **self.trainee.counts,
        }
        if good and (step % pace.eval_every == 0 or step == pace.steps):
            values |= self._check(step)
        if self.run:
            self.run.row(step, **values)
            if now - self.told_at > STATUS_EVERY:
                self.told_at = now
                self.run.status("running", step=step, tokens=at.tokens, loss=row["loss"])
        if self.count:
            self.count(1, live_note(values))
        if step % pace.save_every == 0:
            self.save(last=step == pace.steps)
        ends = self._obey(bool(stop and stop(step)))
        self.clock = time.monotonic()  # checks, saving and pauses are no training time
        return ends

    def _check(self, step: int) -> dict[str, float]:
        """The small evaluation; one that fails is told and does not end the run."""
        try:
            return self.trainee.check(step, self.at.budget, lambda: self.signals.requested)
        except ModelError as error:
            self._emit("eval/failed", level="warning", step=step, why=str(error))
            return {}

    def _on_memory(self) -> bool:
        """Halve the micro-batch, once. In a team one process cannot go back alone, so there it is an error."""
        fits = self.team.size == 1 and self.trainee.smaller()
        if fits:
            self._emit("train/memory", level="warning", what="a micro-batch did not fit; halved, same step again")
        return fits

    def _roll_back(self, error: UnstableError) -> None:
        """To the newest good checkpoint, past the data that led here, at half the rate."""
        at = self.at
        if at.roll_backs >= ROLL_BACKS:
            raise DivergedError(
                f"{error.why} (step {error.step}), after {at.roll_backs} roll-backs with half the learning rate each; "
                f"the last good checkpoint is of step {self.saved_at}. Lower the learning rate, or look at the data."
            ) from None
        found: list[Any] = [None, 0, 0]
        if self.run:
            with contextlib.suppress(CheckpointError):
                good = checkpoint.newest(self.run.checkpoints, check=self.trainee.check_folder)
                found = [str(good.path), good.step, read_facts(good.path)["tokens"]]
        place, step, tokens = self.team.tell(found)
        at.passed_over += error.step - step
        at.lr_scale, at.roll_backs = at.lr_scale * 0.5, at.roll_backs + 1
        if error.skipped is not None:  # the step that raised was not logged any more
            at.skipped = self.skipped_before + error.skipped
        self.skipped_before = at.skipped
        at.step, at.tokens, self.saved_at = step, tokens, step
        self.trainee.restore(Path(place) if place else None)
        if self.run:
            self.run.rewind(step)
        self._emit("train/rolled_back", level="warning", why=error.why, bad_step=error.step, to_step=step,
                   passed_over=at.passed_over, lr_scale=at.lr_scale)  # fmt: skip
        self.clock = time.monotonic()

    def _disk_full(self, error: CheckpointError) -> CheckpointError:
        """Save once more in the space that was held for it; the error to raise, which says what was saved."""
        if self.team.size > 1 or self.run is None or self.at.step == self.saved_at or self.ballast is None:
            return error
        self.ballast.free()
        saved = None
        with contextlib.suppress(GnomonError, OSError):
            gathered = self.trainee.gathered()
            with checkpoint.publish(self.run.checkpoints, self.at.step) as folder:
                self._write(self.run, folder, gathered)
            saved = f"checkpoint-{self.at.step}"
        told = f"{saved} was saved in the space that was held for it" if saved else "nothing more could be saved"
        return DiskFullError(f"{error}; {told}", saved)

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self, last: bool = False) -> None:
        """Publish checkpoint-<step> and remove what need not stay. Raises UnstableError for weights with NaN."""
        gathered, why = self.trainee.gathered(), None
        if self.run:
            try:
                self._publish(self.run, gathered, last)
            except NotFiniteError as error:
                why = str(error)
                self._emit("checkpoint/refused", level="warning", step=self.at.step, why=why)
        if self.team.tell(why):  # after this all processes are here
            raise UnstableError(self.at.step, "the weights are not finite")
        self.saved_at = self.at.step

    def _publish(self, run: Run, gathered: Any, last: bool) -> None:
        at, root = self.at, run.checkpoints

        def write(folder: Path) -> None:
            self._write(run, folder, gathered)

        def tell(what: str) -> None:
            self._emit("checkpoint/disk", level="warning", what=what)

        if last and self.ballast:
            self.ballast.free()
        place = checkpoint.store(root, at.step, write, protect=self.protected, ballast=self.ballast, tell=tell)
        run.status("running", step=at.step, checkpoint=place.name)
        self._emit("checkpoint/saved", step=at.step, name=place.name)
        checkpoint.prune(root, self.pace.keep, every=self.pace.keep_every, protect=self.protected)
        if self.ballast and not last and not self.ballast.hold(size_of(place)):
            self._emit("checkpoint/disk", level="warning", what="no room to reserve for the last checkpoint")

    def _write(self, run: Run, folder: Path, gathered: Any) -> None:
        """Everything of a checkpoint, into a folder that is not published yet."""
        self.trainee.write(folder, gathered, asdict(self.at))
        copy_provenance(run.folder, folder)

    # --- commands ----------------------------------------------------------------------------------------------------

    def _obey(self, stop: bool) -> bool:
        """Take commands, wait while paused; True = end here."""
        while True:
            heard = self.commands.poll() if self.commands else []
            for item in heard:
                if isinstance(item, Rejected):
                    self._emit("control/rejected", level="warning", line=item.line, why=item.why)
            said = self.team.tell([asdict(c) for c in heard if isinstance(c, Command)])
            for body in said:
                self._apply(body["seq"], body["name"], body["value"])
            if self.team.any(stop or self.asked_to_stop or self.signals.requested):
                return True
            if not self.paused:
                return False
            time.sleep(PAUSE)

    def _apply(self, seq: int, name: str, value: Any) -> None:
        """One command, on every process; the leader acknowledges it."""
        at, why = self.at, ""
        if name in ("lr", "budget", "defaults"):
            self.undo.append((at.lr_scale, at.budget))
        if name == "pause":
            self.paused = True
        elif name == "resume":
            self.paused = False
        elif name == "stop":
            self.asked_to_stop = True
        elif name == "checkpoint":
            if at.step == self.saved_at:
                why = f"checkpoint-{at.step} is there already"
            else:
                try:
                    self.save()
                except UnstableError as error:
                    self._emit(ACK, **Ack(seq, name, value, False, error.why).facts(), step=at.step)
                    raise
        elif name == "lr":
            at.lr_scale = float(value) / self.trainee.headline_rate()
        elif name == "budget":
            at.budget = value
        elif name == "defaults":
            at.lr_scale, at.budget = 1.0, None
        elif name == "undo":
            if self.undo:
                at.lr_scale, at.budget = self.undo.pop()
            else:
                why = "nothing was changed"
        if self.run and name in ("pause", "resume"):
            self.run.status("paused" if self.paused else "running", step=at.step)
        self._emit(ACK, **Ack(seq, name, value, not why, why).facts(), step=at.step)

    def _emit(self, name: str, /, level: Any = "info", **data: Any) -> None:
        if self.run:
            self.run.events.emit(name, level=level, **data)
