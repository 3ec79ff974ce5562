"""One small family of teaching errors: what was wrong, what was given, what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GnomonError(ValueError):
    """Base of every error that a user can cause and mend. `exit_code`: what the command line ends with."""

    exit_code: ClassVar[int] = 2


class ConfigError(GnomonError):
    """A configuration value or key is wrong."""


class UnknownNameError(ConfigError):
    """A task, model, key or verb that does not exist; the message suggests the nearest one."""


class DataError(GnomonError):
    """A record or file cannot be used; the message names the record."""


class ModelError(GnomonError):
    """A model folder is missing, incomplete or of another kind."""


class BudgetError(GnomonError):
    """A token budget that cannot be kept."""


class TagError(GnomonError):
    """A tag or stop sequence that the tokenizer cannot match."""


class CheckpointError(GnomonError):
    """A checkpoint that is incomplete, damaged or foreign, or cannot be written."""


class NotFiniteError(CheckpointError):
    """Weights or states with NaN or infinities, which are never written."""


class DiskFullError(CheckpointError):
    """No room for a checkpoint, even after old ones were removed. saved: the last one that reached the disk."""

    exit_code: ClassVar[int] = 28  # ENOSPC

    def __init__(self, message: str, saved: str | None = None) -> None:
        super().__init__(message)
        self.saved = saved


class RunBusyError(GnomonError):
    """Another process works in this run folder. pid: its number, when it is known."""

    def __init__(self, message: str, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option closest in spelling to `name`, or None when nothing is close."""
    hits = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return hits[0] if hits else None


def unknown(kind: str, name: str, options: Iterable[str]) -> UnknownNameError:
    """A teaching error for a name that is not among `options` (to be raised by the caller)."""
    names = sorted(options)
    hint = nearest(name, names)
    lead = f"unknown {kind} {name!r}"
    if hint:
        lead += f"; did you mean {hint!r}?"
    return UnknownNameError(f"{lead} Known: {', '.join(names)}.")
