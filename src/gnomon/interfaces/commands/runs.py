"""`demo`, `report` and `runs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gnomon.base.checkpoint import alive
from gnomon.interfaces import console

Flag = Parameter(negative=())


def demo(
    *,
    model: str = "nano",
    quick: Annotated[bool, Flag] = False,
    from_scratch: Annotated[bool, Flag] = False,
    no_chat: Annotated[bool, Flag] = False,
    runs: Path = Path("runs"),
    json: Annotated[bool, Flag] = False,
) -> None:
    """Watch a small model learn how much to think: rollouts, heads, calibration, sweep, report, chat.

    Args:
        model: A shipped model (nano) or a local folder of an own model.
        quick: A tenth of the problems; wide intervals.
        from_scratch: Train `micro` on a few easy families from nothing first (about ten minutes more).
        no_chat: Do not chat at the end (there is no chat without a terminal).
        runs: Where the run folder is made.
        json: Print one JSON object with the claims.
    """
    from gnomon.recipes import demo as recipe
    from gnomon.recipes.claims import COLUMNS

    def opened(folder: Path) -> None:
        again = f"gnomon train metacog --config {folder / 'resolved.yaml'} --run {folder}"
        console.on_interrupt(f"finished stages of rollouts are kept; go on with: {again}")

    config = recipe.demo_config(quick, model)
    if from_scratch:
        config = recipe.from_scratch(runs, console.say)
    done = recipe.run(config, runs, console.say, opened)
    if json:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in done.rows]
        console.emit_json({"run": str(done.folder), "report": str(done.page), "claims": rows})
        return
    console.table("What this run shows", COLUMNS, done.rows, "Every number was computed in this run.")
    console.say(f'report: {done.page}\nask it: gnomon ask --model {done.folder / "model"} "Compute 34 + 27 - 15."')
    if sys.stdin.isatty() and sys.stdout.isatty() and not no_chat:
        from gnomon.interfaces.chat import Chat

        Chat(done.outcome.trained.reasoner).run()


def report(run: str, *, root: Path = Path("runs")) -> None:
    """Write report.html of a run: of a metacog or demo run as it was measured, of a pretraining run its curves.

    Args:
        run: A run folder, its name, a prefix (the newest wins), or latest.
        root: Where run folders lie.
    """
    from gnomon.base.runs import find_run
    from gnomon.recipes.claims import rewrite

    console.say(f"report: {rewrite(find_run(run, root))}")


def runs(*, root: Path = Path("runs"), json: Annotated[bool, Flag] = False) -> None:
    """List run folders with their state.

    Args:
        root: Where run folders lie.
        json: Print one JSON object.
    """
    import json as codec

    found = []
    for path in sorted(root.glob("*/status.json")) if root.is_dir() else []:
        status = codec.loads(path.read_text(encoding="utf-8"))
        if status.get("state") == "running" and not alive(int(status.get("pid", -1))):
            status["state"] = "crashed"
        found.append({"run": path.parent.name, **{k: status.get(k) for k in ("state", "step", "total", "error")}})
    if json:
        console.emit_json({"runs": found})
    elif found:
        console.table(str(root), ("run", "state", "step", "of", "error"), [tuple(f.values()) for f in found])
    else:
        console.say(f"no runs under {root}; start one with: gnomon demo")
