"""`control`: talk to a run that is going on."""

from __future__ import annotations

import json as codec
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gnomon.base.errors import ConfigError
from gnomon.interfaces import console

Flag = Parameter(negative=())
REFUSED = 1


def control(
    run: str,
    command: str,
    value: str | None = None,
    /,
    *,
    root: Path = Path("runs"),
    timeout: float = 10.0,
    json: Annotated[bool, Flag] = False,
) -> int:
    """Send a command to a running run and wait for its answer.

    Commands: pause, resume, checkpoint (save now), lr VALUE, budget VALUE (a number of tokens, or none for no cap),
    undo (the last change of lr or budget), defaults, stop (finish the step, save, end).

    Args:
        run: A run folder, its name, a prefix (the newest wins), or latest.
        command: One of the commands above.
        value: What lr or budget shall be.
        root: Where run folders lie.
        timeout: Seconds to wait for the answer.
        json: Print one JSON object.
    """
    from gnomon.base.control import COMMANDS, send, wait_ack
    from gnomon.base.errors import unknown
    from gnomon.base.lock import probe
    from gnomon.base.runs import find_run

    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    number = _value(command, value)
    folder = find_run(run, root)
    holder = probe(folder)
    if holder is None:
        raise ConfigError(
            f"no process works in {folder} (state: {_state(folder)}), so nothing was sent; "
            f"go on with it: gnomon train RECIPE --run {folder} --resume auto"
        )
    began = time.time()
    seq = send(folder, command, number)
    ack = wait_ack(folder, seq, timeout, since=began)
    told = {"run": str(folder), "pid": holder, "seq": seq, "command": command, "value": number}
    if json:
        answer = {"ok": ack.ok, "why": ack.why} if ack else {"ok": None, "why": f"no answer within {timeout:g} s"}
        console.emit_json({**told, "acknowledged": ack is not None, **answer})
    elif ack is None:
        console.say(
            f"{command} was sent as number {seq}, but process {holder} gave no answer within {timeout:g} s "
            f"(stage: {_status(folder, 'stage')}): it prepares, is in a long step, or hangs. "
            f"Look for {seq} in {folder / 'events.jsonl'}"
        )
    else:
        console.say(f"{folder.name}: {command} {'done' if ack.ok else 'refused'}{f': {ack.why}' if ack.why else ''}")
    return 0 if ack is not None and ack.ok else REFUSED


def _value(command: str, text: str | None) -> float | int | None:
    """The typed value as the command wants it. Raises ConfigError."""
    from gnomon.base.control import checked

    if text is None and command in ("lr", "budget"):
        example = "3e-4" if command == "lr" else "128"
        raise ConfigError(f"{command} needs a value, such as: gnomon control RUN {command} {example}")
    if text is None:
        return checked(command)
    if command == "budget" and text.lower() in ("none", "null", "off"):
        return None
    number: object = text
    for kind in (int, float):
        try:
            number = kind(text)
            break
        except ValueError:
            continue
    return checked(command, number)


def _state(folder: Path) -> str:
    state = _status(folder, "state")
    return "crashed" if state in ("running", "paused") else state


def _status(folder: Path, key: str) -> str:
    try:
        return str(codec.loads((folder / "status.json").read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
