"""Run folders: `runs/<name>-<utc>/` with resolved config, provenance, metrics, events, status and checkpoints."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from gnomon.base.atomic import write_atomic
from gnomon.base.config import dump_yaml
from gnomon.base.errors import ConfigError, nearest
from gnomon.base.screen import screen
from gnomon.base.telemetry import JsonlSink, JsonlWriter, Telemetry, finite
from gnomon.base.trackers import Tracker, close_all, open_trackers

CONSOLE_LOG: Final = "stdout.log"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
_PACKAGES: Final = (
    "gnomon", "torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy", "pydantic",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers, without importing them."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(folder: Path) -> str | None:
    """`<sha>` or `<sha>+changes` of the repository that holds `folder`; None outside a repository or without git."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*args: str) -> str | None:
        try:
            call = [git, "-C", str(folder), *args]
            done = subprocess.run(call, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = ask("rev-parse", "HEAD")
    if not sha:
        return None
    return sha + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")


class Run:
    """An open run folder. As a context manager it ends with a state: done, stopped (Ctrl-C) or failed (with why).

    metrics: rows `{"step", "time", "tokens", …}` with slash names. events: a Telemetry onto events.jsonl.
    trackers: where rows and samples go beside that. What the console says while the run is open is in stdout.log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for sub in ("samples", "plots", "checkpoints"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        self.metrics = JsonlWriter(folder / "metrics.jsonl")
        self.events = Telemetry(JsonlSink(folder / "events.jsonl"))
        self.trackers: list[Tracker] = []
        self._status: dict[str, Any] = {"started": time.time(), "pid": os.getpid(), "host": platform.node()}
        self.status("running")
        screen().attach(folder / CONSOLE_LOG)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def name(self) -> str:
        return self.folder.name

    def row(self, step: int, **values: Any) -> None:
        """One metrics row; keyword names may carry slashes: `run.row(5, **{"train/loss": 0.3})`."""
        row = {"step": step, "time": time.time(), **values}
        self.metrics.write(row)
        if self.trackers:
            clean = finite(row)
            self._hand_on(lambda tracker: tracker.row(step, clean))

    def sample(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Outputs of the model after `step`: samples/step-N.jsonl, and as text to the trackers."""
        path = self.folder / "samples" / f"step-{step}.jsonl"
        lines = [json.dumps(finite(row), ensure_ascii=False, allow_nan=False) for row in rows]
        write_atomic(path, "".join(line + "\n" for line in lines).encode("utf-8", "replace"))
        text = "\n\n".join("\n".join(f"{k}: {v}" for k, v in row.items()) for row in rows)
        self._hand_on(lambda tracker: tracker.sample(step, text))
        return path

    def track(self, names: Sequence[str], config: Mapping[str, Any], start: int = 0) -> None:
        """Open trackers by name, for a run that goes on behind step `start`; see `open_trackers` for its errors."""
        self.trackers += open_trackers(names, self.folder, self.name, config, start)

    def _hand_on(self, give: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self.trackers):
            give(tracker)
            if tracker.failure is not None:
                self.trackers.remove(tracker)
                self._given_up(tracker)

    def _given_up(self, tracker: Tracker) -> None:
        facts = {"tracker": tracker.name, "why": tracker.failure or "it was too slow", "rows_dropped": tracker.dropped}
        self.events.emit("tracker/failed", level="warning", **facts)

    def rewind(self, step: int) -> None:
        """Drop metrics rows behind `step`: they belong to a future that a crash or a roll-back has undone."""
        path = self.folder / "metrics.jsonl"
        rows = path.read_bytes().splitlines(keepends=True)
        found = [_step_of(row) for row in rows]
        if broken := found.count(None):
            self.events.emit("metrics/unreadable", level="warning", what=f"{broken} lines of {path.name} are dropped")
        kept = [row for row, at in zip(rows, found, strict=True) if at is not None and at <= step]
        if len(kept) < len(rows):
            self.metrics.close()
            write_atomic(path, b"".join(kept))
            self.metrics = JsonlWriter(path)

    def status(self, state: str, **facts: Any) -> None:
        """Replace status.json; `facts` (stage, step, total, …) stay until overwritten."""
        self._status.update(facts, state=state, updated=time.time())
        self.write_json("status.json", self._status)

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file into the run folder, whole or not at all."""
        path = self.folder / name
        write_atomic(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    def close(self) -> None:
        """Flush metrics and events; trackers have five seconds in all."""
        self.metrics.close()
        trackers, self.trackers = self.trackers, []
        close_all(trackers)
        for tracker in trackers:
            if tracker.failure is not None or tracker.dropped:
                self._given_up(tracker)
        self.events.close()
        screen().detach(self.folder / CONSOLE_LOG)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.status("done")
        elif issubclass(kind, (KeyboardInterrupt, SystemExit)):
            self.status("stopped")
        else:
            self.status("failed", error=f"{kind.__name__}: {str(error)[:500]}")
        self.close()


def _step_of(row: bytes) -> float | None:
    """The step of a metrics row; None for a line that is none."""
    try:
        at = json.loads(row)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return at if isinstance(at, (int, float)) else None


def create_run(
    name: str,
    config: BaseModel,
    root: Path = Path("runs"),
    origins: Mapping[str, str] | None = None,
    seed: int | str | None = None,
    data: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
) -> Run:
    """Make `root/<name>-<utc>/` with resolved.yaml and provenance.json, and open it.

    origins: dotted key -> where a non-default value came from (`config.resolve`). data: file -> fingerprint.
    Raises ConfigError for a name that is no plain file name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"run name {name!r}: use letters, digits, '.', '_', '-', a letter or digit first")
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{stamp}"
    number = 2
    while True:
        try:
            folder.mkdir()
            break
        except FileExistsError:
            folder = root / f"{name}-{stamp}-{number}"
            number += 1
    return open_run(folder, config, origins, seed, data, command)


def open_run(
    folder: Path,
    config: BaseModel,
    origins: Mapping[str, str] | None = None,
    seed: int | str | None = None,
    data: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
) -> Run:
    """Open exactly `folder` (made when missing) with fresh resolved.yaml and provenance.json; see `create_run`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "resolved.yaml", dump_yaml(config))
    run = Run(folder)
    run.write_json(
        "provenance.json",
        {
            "origins": dict(origins or {}),
            "command": list(sys.argv if command is None else command),
            "versions": versions(),
            "commit": git_commit(Path(__file__).parent),
            "seed": seed,
            "data": dict(data or {}),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "created": datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
        },
    )
    return run


def copy_provenance(run: Path, checkpoint: Path) -> None:
    """Copy resolved.yaml and provenance.json of a run into a checkpoint folder that is being written."""
    for name in ("resolved.yaml", "provenance.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, checkpoint / name)


def find_run(name: str, root: Path = Path("runs")) -> Path:
    """The folder of a run: a path, a full name, or a prefix (the newest one wins; `latest` = the newest of all).

    Raises ConfigError with the nearest name.
    """
    if (Path(name) / "status.json").is_file() or (Path(name) / "resolved.yaml").is_file():
        return Path(name)
    folders = sorted((p for p in root.glob("*") if (p / "status.json").is_file()), key=lambda p: p.stat().st_mtime)
    chosen = folders if name == "latest" else [p for p in folders if p.name == name or p.name.startswith(name + "-")]
    if chosen:
        return chosen[-1]
    names = [p.name for p in folders]
    hint = nearest(name, names)
    there = ", ".join(names[-8:]) or "none"
    meant = f"; did you mean {hint!r}?" if hint else ""
    raise ConfigError(f"no run {name!r} under {str(root)!r}{meant} Runs there: {there}.")
