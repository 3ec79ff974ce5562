"""Saves checkpoints until somebody kills it; without torch, so that it starts quickly. Used by test_checkpoint_kill.py.

kill_save.py save RUN NAME      take the lock, sweep, go on behind the newest checkpoint; says "saved N" each time
kill_save.py points RUN [old]   dies by kill -9 before and after every system call of a save, a child each; prints
                                JSON {"points", "bad"}. old: as on a system that cannot swap two names
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gnomon.base import checkpoint as ck
from gnomon.base import seeds
from gnomon.base.atomic import write_atomic
from gnomon.base.lock import RunLock, probe

KEEP = 2
SIZE = 200_000
CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def content(step: int, name: str) -> bytes:
    return seeds.rng("weights", step, name).randbytes(SIZE)


def save(root: Path, step: int, name: str) -> None:
    def write(folder: Path) -> None:
        write_atomic(folder / "model.bin", content(step, name))
        write_atomic(folder / "train" / "state.json", json.dumps({"step": step, "name": name}))

    ck.store(root, step, write)


def faults(root: Path) -> list[str]:
    """What is wrong with the checkpoints of a folder after a kill; [] = all is as it should be."""
    wrong = []
    for step in ck.steps(root):
        folder = root / f"checkpoint-{step}"
        try:
            ck.verify_folder(folder)
            state = json.loads((folder / "train" / "state.json").read_text())
            if state["step"] != step or (folder / "model.bin").read_bytes() != content(step, state["name"]):
                wrong.append(f"{folder.name} has the content of another save")
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def leftovers(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.name.startswith(".") and p.name != ".ballast"]


def run(folder: Path, name: str) -> None:
    root = folder / "checkpoints"
    with RunLock(folder), ck.Ballast(root) as ballast:
        ck.sweep(root)
        ck.prune(root, KEEP)
        step = ck.newest(root).step if ck.steps(root) else 0
        print("ready", flush=True)
        save(root, step, name)  # the step that is there already, with other content
        print("saved", step, flush=True)
        ballast.hold(SIZE)
        while True:
            step += 1
            save(root, step, name)
            print("saved", step, flush=True)
            ck.prune(root, KEEP)


def die_at(number: int) -> Callable[[], int]:
    """From here on the process kills itself at its `number`-th look; returns what counts the looks."""
    count = 0

    def look() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            look()
            value = call(*args, **kwargs)
            look()
            return value

        return inner

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    ck.exchange = wrapped(ck.exchange)  # type: ignore[attr-defined]
    return lambda: count


def points(folder: Path) -> dict[str, Any]:
    """Die at every point of: take the lock, save step 2 again, save step 3, prune to two."""
    number, bad = 0, []
    while True:
        number += 1
        here = folder / str(number)
        root = here / "checkpoints"
        save(root, 1, "first")
        save(root, 2, "first")
        child = os.fork()
        if child == 0:
            die_at(number)
            with RunLock(here):
                save(root, 2, "second")
                save(root, 3, "second")
                ck.prune(root, KEEP)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if probe(here) is not None:
            bad.append(f"{number}: still locked")
        before = [f"{number}: {text}" for text in faults(root)]
        with RunLock(here):
            ck.sweep(root)
        found = ck.newest(root)
        after = [*faults(root), *leftovers(root), *(why for _, why in found.skipped)]
        bad += before + [f"{number}, swept: {text}" for text in after]
        if found.step not in (2, 3):
            bad.append(f"{number}: fell back to {found.step}")
        if os.WIFEXITED(status):
            return {"points": number - 1, "bad": bad}


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "save":
        run(folder, sys.argv[3])
    else:
        if sys.argv[3:] == ["old"]:
            ck.exchange = lambda a, b: False  # type: ignore[attr-defined]
        print(json.dumps(points(folder)))


if __name__ == "__main__":
    main()
