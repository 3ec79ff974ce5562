"""Trial answers at node boundaries: what closing the thought there would have given (rows C8, D2).

R rows: every boundary inside uncapped greedy thoughts · L layers · C hidden size. The label of the running confidence:
"does the whole thought end right" says nothing about stopping now (docs/log.md, 2026-11-21, study c).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import DataError
from gnomon.training.labels import FACTS_FILE, STATES_FILE, States

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_ROWS: Final = ("used", "right", "problem", "plan", "total", "final")


@dataclass(frozen=True)
class Trials:
    """Boundaries with trial answers.

    plans: order of `plan`; problems: ids (`rollout.problem_id`). taps [R, L, C] at the boundary, used [R] think tokens
    there, right [R]: closed there the answer is right. problem, plan [R]: indices. total, final [R]: think tokens of
    the whole thought, and whether its own answer is right. Rows of one thought stand together, in order; a part of a
    draw may have none.
    """

    plans: tuple[str, ...]
    problems: tuple[str, ...]
    taps: States
    used: Ints
    right: Bools
    problem: Ints
    plan: Ints
    total: Ints
    final: Bools
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _ROWS:
            if getattr(self, name).shape != (len(self.taps),):
                raise DataError(f"{name} must be [{len(self.taps)}], got {list(getattr(self, name).shape)}")

    def save(self, folder: Path) -> Path:
        """Write states (safetensors) and facts (JSON, last) into a folder; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"taps": self.taps, **{name: getattr(self, name) for name in _ROWS}}
        save_tensors(folder, STATES_FILE, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()})
        body = {"version": 1, "trials": True, "plans": self.plans, "problems": self.problems, "meta": self.meta}
        write_atomic(folder / FACTS_FILE, json.dumps(body) + "\n")
        return folder

    @classmethod
    def joined(cls, parts: Sequence[Trials]) -> Trials:
        """The rows of parts of one draw, made under the same plans, one part behind the other.

        Raises DataError where none of them has a row.
        """
        held = [part for part in parts if len(part.taps)]
        if not held:
            raise DataError("no thought has a node boundary, so there is no place for a trial answer")
        ids: list[str] = []
        rows: dict[str, list[Any]] = {name: [] for name in ("taps", *_ROWS)}
        for part in parts:
            for name in rows if len(part.taps) else ():
                rows[name].append(getattr(part, name))
            if len(part.taps):
                rows["problem"][-1] = part.problem + len(ids)
            ids += part.problems
        return cls(held[0].plans, tuple(ids), meta=held[0].meta, **{k: np.concatenate(v) for k, v in rows.items()})

    @classmethod
    def load(cls, folder: Path) -> Trials:
        """Read what `save` wrote. Raises DataError when it is missing or damaged."""
        path = folder / FACTS_FILE
        if not path.is_file():
            raise DataError(f"no trial answers in {str(folder)!r}: {FACTS_FILE} is missing (was it interrupted?)")
        rows = {k: v.numpy() for k, v in load_tensors(folder, STATES_FILE).items()}
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(body["plans"]), tuple(body["problems"]), meta=body["meta"], **rows)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the trial answers in {str(folder)!r} are damaged: {error!r}") from None
