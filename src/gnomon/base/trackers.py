"""Where metrics rows go beside metrics.jsonl: TensorBoard, Weights & Biases (offline unless told), trackio (local).

A tracker is a guest: it works on its own thread behind a bounded queue, so one that hangs or fails never stops or slows
a run. `failure` says why one was given up. What a rewind (a resume, a roll-back) does to each is in its class.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import netrc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

from gnomon.base.errors import ConfigError, unknown

WAITING: Final = 4096  # rows that may wait for a slow tracker; further ones are dropped and counted
PATIENCE: Final = 5.0  # seconds that closing waits for all trackers together


class MetricSink(Protocol):
    """Takes what a run measures. Steps may come again after a rewind; then the later values hold."""

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one optimiser step under slash names; None where a number was not finite."""

    def sample(self, step: int, text: str) -> None:
        """Outputs of the model after a step, as text."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Every value of the run's config."""

    def close(self) -> None:
        """Flush and release."""


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What of a row can be drawn."""
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and k not in ("step", "time")}


class Tracker:
    """A MetricSink that hands everything to `sink` on a thread of its own. It never raises and never waits."""

    def __init__(self, name: str, sink: MetricSink, waiting: int = WAITING) -> None:
        self.name, self._sink = name, sink
        self.failure: str | None = None
        self.dropped = 0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        kept = dict(values)
        self._put(lambda: self._sink.row(step, kept))

    def sample(self, step: int, text: str) -> None:
        self._put(lambda: self._sink.sample(step, text))

    def config(self, values: Mapping[str, Any]) -> None:
        kept = dict(values)
        self._put(lambda: self._sink.config(kept))

    def _put(self, job: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        while True:
            try:
                job = self._queue.get(timeout=0.5)
            except queue.Empty:
                if self._ended.is_set():
                    return
                continue
            try:
                if job is None:
                    self._sink.close()
                    return
                job()
            except Exception as error:  # noqa: BLE001 - somebody else's code: whatever it is, it ends this tracker only
                self.failure = f"{type(error).__name__}: {str(error)[:300]}"
                return

    def ask_close(self) -> None:
        """Let the thread finish what waits and close the sink; returns at once."""
        self._ended.set()
        if self.failure is None:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                self.failure = f"closed with {self._queue.qsize()} rows still waiting"

    def close(self, deadline: float | None = None) -> None:
        """`ask_close`, then wait until `deadline` (time.monotonic; default: PATIENCE from now)."""
        if not self._ended.is_set():
            self.ask_close()
        end = time.monotonic() + PATIENCE if deadline is None else deadline
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive() and self.failure is None:
            self.failure = f"did not finish in time; about {self._queue.qsize()} rows were not handed over"


def close_all(trackers: Sequence[Tracker], patience: float = PATIENCE) -> None:
    """Close trackers side by side within `patience` seconds in all."""
    end = time.monotonic() + patience
    for tracker in trackers:
        tracker.ask_close()
    for tracker in trackers:
        tracker.close(end)


# --- the packages ----------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files below `folder`/tensorboard. A step that comes again opens a new file that purges from that step on.

    Readers (TensorBoard, EventAccumulator) then forget the undone rows.
    """

    def __init__(self, folder: Path, name: str, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._place = folder / "tensorboard"
        self._last = start
        self._writer = self._open(start + 1)

    def _open(self, step: int) -> Any:
        return self._make(str(self._place), purge_step=step, flush_secs=5)

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        if step <= self._last:
            self._writer.close()
            self._writer = self._open(step)
        self._last = step
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("samples", _block(text), step)

    def config(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("config", _block(yaml.safe_dump(dict(values), sort_keys=False)), self._last)

    def close(self) -> None:
        self._writer.close()


def _block(text: str) -> str:
    """Text as a Markdown block: model output is shown as it is."""
    return "\n".join("    " + line for line in text.splitlines())


class WandB:
    """An offline run below `folder`/wandb (`wandb sync FOLDER` uploads it); WANDB_MODE=online sends it at once.

    The x axis is our own `step`, so rows that come again are kept, not refused. Every session of a resumed run is a W&B
    run of its own in the group of the run's name: offline there is nobody to ask what the earlier session has sent.
    """

    def __init__(self, folder: Path, name: str, start: int) -> None:
        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        if mode == "online" and not _wandb_key():
            raise ConfigError(
                "WANDB_MODE=online, but there is no key: run `wandb login` once or set WANDB_API_KEY; "
                "without WANDB_MODE everything stays in the run folder"
            )
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "gnomon",
            name=name if not start else f"{name}-from-{start}",
            group=name,
            dir=str(folder),
            mode=mode,
            config={"resumed_behind_step": start},
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_save_requirements=False
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **numbers(values)})

    def sample(self, step: int, text: str) -> None:
        self._run.log({"step": step, "samples": self._html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Trackio:
    """A run of project `gnomon` in trackio's own local store (`trackio show`); TRACKIO_DIR moves it.

    Every session of a resumed run is a run of its own in the group of the run's name, as with W&B.
    """

    def __init__(self, folder: Path, name: str, start: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints; our stdout belongs to results
            import trackio

            self._markdown = trackio.Markdown
            self._run = trackio.init(
                project="gnomon",
                name=name if not start else f"{name}-from-{start}",
                group=name,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # `finish` prints on our thread, where a redirection would catch what others print.
        vars(sys.modules[type(self._run).__module__])["print"] = lambda *_, **__: None

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(numbers(values), step=step)

    def sample(self, step: int, text: str) -> None:
        self._run.log({"samples": self._markdown(_block(text))}, step=step)

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values))  # travels with the first row

    def close(self) -> None:
        self._run.finish()


SINKS: Final[dict[str, Callable[[Path, str, int], MetricSink]]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_names(names: Sequence[str]) -> None:
    """Raise for a tracker that does not exist, and for one whose package is missing; imports nothing."""
    for name in names:
        if name not in SINKS:
            raise unknown("tracker", name, SINKS)
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracker {name!r} needs the package {name}; install it with: pip install 'gnomon[track]', "
                "or leave the tracker out: metrics.jsonl is always written"
            )


def open_trackers(
    names: Sequence[str], run_folder: Path, run_name: str, config: Mapping[str, Any], start: int = 0
) -> list[Tracker]:
    """Open the named trackers for a run that goes on behind step `start`; `config` is handed to each.

    Raises ConfigError (also for a package that is missing or refuses to start), with none left open.
    """
    wanted = list(dict.fromkeys(names))
    check_names(wanted)
    opened: list[Tracker] = []
    try:
        for name in wanted:
            opened.append(Tracker(name, _start(name, run_folder, run_name, start)))
            opened[-1].config(config)
    except BaseException:
        close_all(opened)
        raise
    return opened


def _start(name: str, folder: Path, run_name: str, start: int) -> MetricSink:
    try:
        return SINKS[name](folder, run_name, start)
    except ConfigError:
        raise
    except Exception as error:  # an installed package of others, of whatever version
        raise ConfigError(f"tracker {name!r} cannot start: {type(error).__name__}: {str(error)[:300]}") from error
