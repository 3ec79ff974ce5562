"""`demo`, `report`, `runs` and `runs show`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gnomon.base.telemetry import span
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
    """List run folders with their state: a run that says it is running but has no process any more has died.

    Args:
        root: Where run folders lie.
        json: Print one JSON object.
    """
    from gnomon.base.run_facts import listing

    found = listing(root)
    if json:
        console.emit_json({"runs": found})
    elif found:
        rows = []
        for r in found:
            seen = f"{span(r['updated'])} ago"
            step = _of(r["step"], r["total"])
            rows.append((r["run"], r["state"], r["stage"] or "-", step, r["loss"], seen, r["error"] or "-"))
        console.table(str(root), ("run", "state", "stage", "step", "loss", "last seen", "error"), rows)
    else:
        console.say(f"no runs under {root}; start one with: gnomon demo")


def show(
    run: str, *, root: Path = Path("runs"), quick: Annotated[bool, Flag] = False, json: Annotated[bool, Flag] = False
) -> None:
    """Show one run: state, last numbers, what differs from the defaults, and its checkpoints, each verified.

    Args:
        run: A run folder, its name, a prefix (the newest wins), or latest.
        root: Where run folders lie.
        quick: Check names and sizes of checkpoints, not their checksums.
        json: Print one JSON object.
    """
    from gnomon.base.run_facts import facts
    from gnomon.base.runs import find_run

    found = facts(find_run(run, root), checksums=not quick)
    if json:
        console.emit_json(found)
        return
    last = {k: v for k, v in found["last"].items() if k not in ("step", "time", "nonfinite")}
    now = time.time()
    lines = [("state", found["state"]), ("stage", found["stage"]), ("step", _of(found["step"], found["total"]))]
    lines += [(k, f"{span(now - found[k])} ago") for k in ("started", "updated") if found[k]]
    lines += [(k, found[k]) for k in ("error", "seed", "commit") if found[k] is not None]
    if found["command"]:
        lines.append(("command", " ".join(found["command"])))
    console.table(found["run"], ("what", "value"), lines)
    if last:
        console.table(f"Last row (step {found['last'].get('step')})", ("metric", "value"), list(last.items()))
    if found["changed"]:
        rows = [(key, str(value), origin) for key, (value, origin) in found["changed"].items()]
        console.table("Changed fields", ("field", "value", "from"), rows)
    if found["checkpoints"]:
        rows = [
            (c["name"] + (" (latest)" if c["latest"] else ""), f"{c['bytes'] / 2**20:.1f} MB", c["whole"])
            for c in found["checkpoints"]
        ]
        console.table("Checkpoints", ("name", "size", "whole" + (" (sizes only)" if quick else "")), rows)


def _of(step: int | None, total: int | None) -> str:
    """`step/total`, as far as it is known."""
    return "-" if step is None else f"{step:,}" if total is None else f"{step:,}/{total:,}"
