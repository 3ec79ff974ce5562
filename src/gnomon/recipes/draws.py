"""Rollouts that training learns from, kept by hash of what decides them: a stopped run goes on with those it has."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gnomon.base.atomic import write_atomic
from gnomon.base.errors import DataError
from gnomon.base.telemetry import Progress
from gnomon.metacognition import store
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.training.labels import FACTS_FILE, LabelSet, cache_folder
from gnomon.training.rollout import label, label_trials
from gnomon.training.thoughts import Thought
from gnomon.training.trials import Trials

LESSONS_FILE = "thoughts.json"
_MASKS = ("inside", "think", "answer", "closed")


def acting(reasoner: Reasoner) -> dict[str, Any]:
    """What decides a rollout under a named plan without prediction: the base, and the layer where it acts on it."""
    facts: dict[str, Any] = {"base": reasoner.base}
    decider = reasoner.decider
    if decider is not None and decider.steerer is not None:
        facts["layer"] = store.fingerprint(decider.heads, decider.steerer)
    if reasoner.overlay is not None:
        facts["overlay"] = reasoner.overlay.fingerprint()
    return facts


def predicting(reasoner: Reasoner) -> dict[str, Any]:
    """What decides a rollout under the predicted plan and budget: heads and card too."""
    assert reasoner.decider is not None, "only a layer predicts"
    heads, card, steerer = reasoner.decider.heads, reasoner.decider.card, reasoner.decider.steerer
    written = "" if card is None else card.model_dump_json()
    return acting(reasoner) | {
        "layer": store.fingerprint(heads, steerer),
        "card": hashlib.sha256(written.encode()).hexdigest(),
    }


def labelled(
    reasoner: Reasoner,
    items: Callable[[], Sequence[Problem]],
    title: str,
    *,
    strategies: Sequence[str],
    samples: int,
    cap: int | None,
    max_batch: int,
    seed: str,
    n: int,
    facts: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> LabelSet:
    """Labels of `n` problems with a progress bar, from `cache` where the same were made before.

    items: makes the problems, when they are needed. facts: name the labels in the cache (with the model, `acting`).
    """
    folder = None if cache is None else cache_folder(cache, dict(facts or {}))
    if folder is not None and (folder / FACTS_FILE).is_file():
        return LabelSet.load(folder)
    with Progress(title, n * len(strategies) * (1 + samples)) as bar:
        found = label(
            reasoner, items(), strategies=strategies, samples=samples, cap=cap, max_batch=max_batch, seed=seed,
            on_done=bar.advance, meta=dict(facts or {}),
        )  # fmt: skip
    if folder is not None:
        found.save(folder)
    return found


def tried(
    reasoner: Reasoner,
    items: Callable[[], Sequence[Problem]],
    title: str,
    *,
    strategies: Sequence[str],
    cap: int | None,
    max_batch: int,
    n: int,
    facts: Mapping[str, Any],
    cache: Path | None = None,
) -> Trials:
    """Trial answers of `n` problems, as `labelled` gives labels; a stopped draw goes on with its finished parts."""
    folder = None if cache is None else cache_folder(cache, facts)
    if folder is not None and (folder / FACTS_FILE).is_file():
        return Trials.load(folder)
    parts = None if folder is None else folder / "parts"
    with Progress(title, n * len(strategies)) as bar:
        found = label_trials(
            reasoner, items(), strategies=strategies, cap=cap, max_batch=max_batch, on_done=bar.advance,
            meta=dict(facts), keep=parts,
        )  # fmt: skip
    if folder is not None and parts is not None:
        found.save(folder)
        shutil.rmtree(parts, ignore_errors=True)
    return found


@dataclass(frozen=True)
class Lessons:
    """Of one round of rollouts: the thoughts to learn from, right answers behind a cut, and what was reported."""

    thoughts: tuple[Thought, ...]
    cut: tuple[Thought, ...]
    report: dict[str, Any]

    def save(self, folder: Path) -> None:
        """One JSON file, whole or not at all."""
        body = {"thoughts": list(map(_plain, self.thoughts)), "cut": list(map(_plain, self.cut)), "report": self.report}
        write_atomic(folder / LESSONS_FILE, json.dumps(body) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Lessons:
        """What `save` wrote. Raises DataError where it is damaged."""
        path = folder / LESSONS_FILE
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            report = dict(body["report"])
            report["think_rate_by_level"] = {int(k): v for k, v in report["think_rate_by_level"].items()}
            return cls(tuple(map(_thought, body["thoughts"])), tuple(map(_thought, body["cut"])), report)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the rollouts in {str(path)!r} are damaged ({error!r}); remove the folder, they are made again"
            ) from None


def lessons(make: Callable[[], Lessons], facts: Mapping[str, Any], cache: Path | None = None) -> Lessons:
    """`make()`, or what it gave the last time with these facts."""
    if cache is None:
        return make()
    folder = cache_folder(cache, facts)
    if (folder / LESSONS_FILE).is_file():
        return Lessons.load(folder)
    found = make()
    found.save(folder)
    return found


def _plain(thought: Thought) -> dict[str, Any]:
    """Masks as texts of 0 and 1."""
    return asdict(thought) | {name: "".join("01"[bool(x)] for x in getattr(thought, name)) for name in _MASKS}


def _thought(values: Mapping[str, Any]) -> Thought:
    masks = {name: tuple(x == "1" for x in values[name]) for name in _MASKS}
    return Thought(**{**values, **masks, "ids": tuple(values["ids"])})
