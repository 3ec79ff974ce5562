"""The command line: one verb per job. Building it imports no torch; a verb imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Group

from gnomon import __version__
from gnomon.base.atomic import disk_error
from gnomon.base.errors import GnomonError
from gnomon.interfaces import console
from gnomon.interfaces.commands import asking, check, control, data, measure, runs, schema, train, validate

USER_ERROR, INTERRUPTED = 2, 130

_START = Group("Start here", sort_key=0)
_MAKE = Group("Make a model", sort_key=1)
_MEASURE = Group("Measure", sort_key=2)
_LOOK = Group("Look and check", sort_key=3)


def build() -> App:
    """The command tree."""
    app = App(
        name="gnomon",
        help="Small language models that know how much to think: strategy, token budget and confidence.",
        version=__version__,
        suppress_keyboard_interrupt=False,
        help_epilogue="Results go to stdout, the rest to stderr; with --json stdout is exactly one object.",
    )
    app.command(runs.demo, group=_START)
    app.command(asking.ask, group=_START)
    app.command(asking.chat, group=_START)
    trains = App(name="train", group=_MAKE, help="Train a model (pretrain) or its metacognitive layer (metacog).")
    trains.command(train.pretrain)
    trains.command(train.metacog)
    app.command(trains)
    datas = App(name="data", group=_MAKE, help="Prepare a training corpus, or look into one.")
    datas.command(data.prepare)
    datas.command(data.inspect)
    app.command(datas)
    tokenizers = App(name="tokenizer", group=_MAKE, help="Train the tokenizer of an own model.")
    tokenizers.command(data.tokenizer_train, name="train")
    app.command(tokenizers)
    app.command(measure.calibrate, group=_MAKE)
    app.command(measure.evaluate, group=_MEASURE)
    app.command(measure.sweep, group=_MEASURE)
    app.command(validate.validate, group=_LOOK)
    app.command(schema.schema, group=_LOOK)
    checks = App(
        name="check", group=_LOOK, help="Black-box tests of a model: does it keep its think budget, is its base sound?"
    )
    checks.command(check.budget)
    checks.command(check.backbone)
    app.command(checks)
    app.command(runs.report, group=_LOOK)
    listed = App(name="runs", group=_LOOK, help="List run folders with their state, or show one with its checkpoints.")
    listed.default(runs.runs)
    listed.command(runs.show)
    app.command(listed)
    app.command(control.control, group=_LOOK)
    return app


def run(tokens: Sequence[str]) -> int:
    """Run one command line; returns the exit code. User errors are one clear line on stderr, never a traceback."""
    if tokens[:1] == ["--"]:  # torchrun … -m gnomon -- train …: without it, torchrun takes our --run for its own
        tokens = tokens[1:]
    try:
        code = build()(list(tokens), print_error=False, exit_on_error=False, result_action="return_value")
    except GnomonError as error:
        console.say(f"{_speaker()}: {str(error).strip()}")
        return error.exit_code  # 2; 28 when the disk is full
    except CycloptsError as error:
        console.say(f"gnomon: {str(error).strip()}")
        return USER_ERROR
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        told = disk_error(error, "the work was ended")
        console.say(f"{_speaker()}: {told}")
        return told.exit_code
    except KeyboardInterrupt:
        console.say(f"\nstopped: {console.interrupt_hint()}")
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _speaker() -> str:
    """Who tells an error: of several processes each, since it may be alone with it."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return "gnomon" if size == "1" else f"gnomon, process {rank} of {size}"


def main() -> None:
    """Entry point of the `gnomon` script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
