"""reasoning-gym datasets as tasks (`gym:NAME`): re-seeded by hash, split by text, strictly scored.

What is mended here (introspection.md §5): neighbouring seeds share items, so every item has its own hashed seed; some
scorers pay for constants or garbage, so those datasets are refused and every score is audited with garbage probes;
some scorers evaluate the answer as Python, so they never see model text.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from dataclasses import dataclass
from typing import Any, Final

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, DataError, unknown
from gnomon.tasks.problem import Problem
from gnomon.tasks.splits import check_split, split_of
from gnomon.tasks.verifiers import Verdict, squeeze

MAX_ATTEMPTS: Final = 300
MAX_FAILURES: Final = 30
MAX_SCORED_CHARS: Final = 1000
LEAKING: Final[dict[str, str]] = {
    "game_of_life_halting": "any text scores 1.0",
    "puzzle24": "the given numbers are never checked; one constant scores 1.0",
    "game_of_life": "one constant scores .96",
    "syllogism": "one constant scores .94",
    "palindrome_generation": "garbage scores",
    "propositional_logic": "garbage scores",
    "sentence_reordering": "garbage scores",
}
# Scorers that evaluate the answer text as Python or through sympy: equality with the gold only.
EXECUTING: Final = frozenset(
    {
        "binary_matrix",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
# An evaluating scorer may see texts that can only be plain arithmetic.
_SAFE_TEXT: Final = {"countdown": re.compile(r"(?!.*(?:\*\s*\*|/\s*/))[0-9+\-*/() ]{1,120}")}
_PROBES: Final = ("zzz", "0", "1", "-", "yes", "True", "[]", "{}", "a b c")


def _package() -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("gym: tasks need reasoning-gym, which is not installed: pip install 'gnomon[gym]'")
    with contextlib.redirect_stdout(io.StringIO()):
        from reasoning_gym import factory
    return factory


def _config(name: str, level: int, seed: int) -> Any:
    """The dataset's configuration: curriculum level `level` - 1 where it has a curriculum, else its default."""
    factory = _package()
    if name in factory.CURRICULA:
        curriculum = factory.CURRICULA[name]()
        curriculum.set_global_level(level - 1)
        return curriculum.generate_configuration({"seed": seed, "size": 1})
    return factory.DATASETS[name][1](seed=seed, size=1)


@functools.lru_cache(maxsize=512)
def _item(name: str, level: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """(dataset of size 1, its only entry). Raises DataError when reasoning-gym cannot make it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = _package().DATASETS[name][0](config=_config(name, level, seed))
            return dataset, dataset[0]
    except ConfigError:
        raise
    except Exception as error:  # foreign code: any failure becomes a named one
        raise DataError(
            f"reasoning-gym cannot make {name!r} at level {level}: {type(error).__name__}: {str(error)[:200]}"
        ) from error


@functools.cache
def _levels(name: str) -> tuple[int, ...]:
    """The curriculum levels (1 = the easiest) whose configuration is valid; (1,) for a dataset without curriculum."""
    factory = _package()
    if name not in factory.CURRICULA:
        return (1,)
    highest = max((len(a.levels) for a in factory.CURRICULA[name]().attributes.values()), default=1)
    found = []
    for level in range(1, min(5, highest) + 1):
        with contextlib.suppress(AssertionError, ValueError):
            getattr(_config(name, level, 1), "validate", bool)()  # two datasets have none
            found.append(level)
    return tuple(found)


def names() -> list[str]:
    """All registered dataset names but the composite."""
    return sorted(n for n in _package().DATASETS if n != "composite")


@dataclass(frozen=True)
class GymSource:
    """A reasoning-gym dataset as a source of problems.

    Raises ConfigError when the package is missing, UnknownNameError for an unknown dataset, ConfigError for a dataset
    whose scorer leaks unless `allow_leaky`.
    """

    dataset: str
    allow_leaky: bool = False

    def __post_init__(self) -> None:
        known = names()
        if self.dataset not in known:
            raise unknown("reasoning-gym dataset", self.dataset, known)
        if not self.levels:
            raise ConfigError(f"reasoning-gym's own levels of {self.dataset!r} are all invalid; choose another dataset")
        if self.dataset in LEAKING and not self.allow_leaky:
            raise ConfigError(
                f"gym:{self.dataset} leaks reward ({LEAKING[self.dataset]}), so a score on it means nothing; "
                f"choose another dataset, or GymSource({self.dataset!r}, allow_leaky=True) to study the leak"
            )

    @property
    def name(self) -> str:
        return f"gym:{self.dataset}"

    @property
    def levels(self) -> tuple[int, ...]:
        return _levels(self.dataset)

    def capacity(self, level: int, split: str) -> int | None:
        """Not known: reasoning-gym does not state how many distinct items a dataset has."""
        return None

    def draw(self, level: int, split: str, stream: str, index: int) -> Problem:
        """Item `index` of (level, split, stream). Raises DataError when the dataset cannot give one."""
        check_split(split)
        if level not in self.levels:
            raise ConfigError(f"{self.name} has levels {self.levels}; {level} was asked")
        failures = 0
        for attempt in range(MAX_ATTEMPTS):
            seed = seeds.derive("gym", self.dataset, level, stream, split, index, attempt) % 2**32
            try:
                _, entry = _item(self.dataset, level, seed)
            except DataError:  # some generators give up on some seeds (countdown, jugs)
                failures += 1
                if failures >= MAX_FAILURES:
                    raise
                continue
            answer = entry["answer"]
            if answer is None:
                raise DataError(f"{self.name} has no gold answer to verify against; choose another dataset")
            if str(answer).strip() and split_of(entry["question"]) == split:
                data = {"dataset": self.dataset, "seed": seed}
                return Problem(self.name, level, entry["question"], str(answer), "gym", data, split, stream, index)
        raise DataError(
            f"{self.name} level {level} gave no {split} item in {MAX_ATTEMPTS} attempts: it has too few distinct "
            f"questions; use another level or dataset"
        )


def _score(dataset: Any, text: str, entry: dict[str, Any]) -> float:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return float(dataset.score_answer(text, entry))
    except Exception:  # noqa: BLE001 - a scorer that raises on model text (prime_factorization does) gives no credit
        return 0.0


def check(problem: Problem, text: str) -> Verdict:
    """Strict: equal to the gold, or full marks from a scorer that passes the garbage probes and runs no text."""
    body = text.strip()
    if squeeze(body) == squeeze(problem.answer):
        return Verdict(True, "ok", body[:200])
    name = str(problem.data["dataset"])
    safe = _SAFE_TEXT.get(name)
    if name in LEAKING or name in EXECUTING or len(body) > MAX_SCORED_CHARS or (safe and not safe.fullmatch(body)):
        return Verdict(False, "wrong", body[:200])
    dataset, entry = _item(name, problem.level, int(problem.data["seed"]))
    if _score(dataset, body, entry) < 1.0:
        return Verdict(False, "wrong", body[:200])
    gold = problem.answer.strip()
    # Full marks for garbage, or for the gold with garbage around it (kakurasu, gsm_symbolic): not a strict scorer.
    probes = [*_PROBES, f"answer: {gold}", f"{gold} zzz"]
    if any(_score(dataset, p, entry) >= 1.0 for p in probes if p != gold and (not safe or safe.fullmatch(p))):
        return Verdict(False, "audit", body[:200])
    return Verdict(True, "ok", body[:200])
