"""What a run folder says about its run, read from outside: whether it lives, how far it is, what it has saved."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from gnomon.base.config import flatten, read_file
from gnomon.base.disk import alive
from gnomon.base.errors import CheckpointError, ConfigError
from gnomon.base.folders import LATEST, size_of, steps, verify_folder
from gnomon.base.lock import NAME as LOCK
from gnomon.base.lock import probe
from gnomon.base.telemetry import read_rows

GOING_ON = ("running", "paused")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def liveness(folder: Path, status: Mapping[str, Any]) -> str:
    """The state of a run: what status.json says, but `died` where it says running and no such process works in it.

    A process number that was given away again, after a restart of the machine say, is told by the process's age.
    """
    state = str(status.get("state", "unreadable"))
    if state not in GOING_ON:
        return state
    if (folder / LOCK).is_file():
        return state if probe(folder) is not None else "died"
    if status.get("host") not in (None, platform.node()):
        return state  # of another machine, and it holds no lock: nothing to ask
    pid = status.get("pid")
    if not isinstance(pid, int) or not alive(pid):
        return "died"
    try:
        born = psutil.Process(pid).create_time()
    except psutil.Error:
        return state
    return state if born <= float(status.get("started", born)) + 5 else "died"


def listing(root: Path) -> list[dict[str, Any]]:
    """Runs below `root`, oldest first: run, state, stage, step, total, loss, updated (s ago), error."""
    found = []
    for path in root.glob("*/status.json") if root.is_dir() else []:
        status = _json(path)
        age = time.time() - float(status.get("updated") or path.stat().st_mtime)
        row = {"run": path.parent.name, "state": liveness(path.parent, status)}
        found.append({**row, **{k: status.get(k) for k in ("stage", "step", "total", "loss", "error")}, "updated": age})
    return sorted(found, key=lambda row: -row["updated"])


def facts(folder: Path, checksums: bool = True) -> dict[str, Any]:
    """Everything about one run: status, last row, changed fields, provenance, checkpoints and whether each is whole.

    checksums: read every file of every checkpoint; False looks at names and sizes.
    """
    status, provenance = _json(folder / "status.json"), _json(folder / "provenance.json")
    rows = read_rows(folder / "metrics.jsonl")
    last = rows[-1] if rows else {}
    try:
        values = flatten(read_file(folder / "resolved.yaml"))
    except ConfigError:
        values = {}
    origins = provenance.get("origins") or {}
    return {
        "run": str(folder),
        "state": liveness(folder, status),
        **{k: status.get(k) for k in ("stage", "step", "total", "error", "started", "updated", "pid")},
        "rows": len(rows),
        "last": last,
        "changed": {key: (values.get(key), origin) for key, origin in sorted(origins.items())},
        **{k: provenance.get(k) for k in ("command", "commit", "seed", "versions", "created")},
        "events": len(read_rows(folder / "events.jsonl")),
        "checkpoints": checkpoints(folder / "checkpoints", checksums),
    }


def checkpoints(root: Path, checksums: bool = True) -> list[dict[str, Any]]:
    """Every checkpoint below `root`, oldest first: name, step, bytes, latest, and `whole`: "yes" or what is wrong."""
    latest = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip() if (root / LATEST).is_file() else ""
    found = []
    for step in steps(root):
        path = root / f"checkpoint-{step}"
        try:
            verify_folder(path, checksums)
            whole = "yes"
        except CheckpointError as error:
            whole = str(error)
        try:
            size = size_of(path)
        except (OSError, CheckpointError):
            size = 0
        found.append({"name": path.name, "step": step, "bytes": size, "latest": path.name == latest, "whole": whole})
    return found
