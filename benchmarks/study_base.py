"""What the studies share: labels and fitted heads from a cache, the look-up baseline, intervals over seeds, tables."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.evaluation.baselines import LookUp, best_strategy
from gnomon.metacognition import store
from gnomon.metacognition.heads import MetacogHeads
from gnomon.reasoner import Reasoner
from gnomon.recipes.metacog import MetacogRunConfig, draw_labels, draw_trials
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import problems
from gnomon.training.heads_fit import HeadsConfig, fit_heads, read_greedy
from gnomon.training.labels import LabelSet
from gnomon.training.rollout import label
from gnomon.training.trials import Trials

QUIET = Path("/work/QUIET")  # somebody measures speed on this machine
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
Key = tuple[str, int]


@dataclass(frozen=True)
class Setup:
    """A base, the run config whose labels are used, where they are kept, where fitted heads and results go."""

    base: Reasoner
    config: MetacogRunConfig
    labels: Path
    cache: Path
    seeds: int = 5

    def draw(self, split: str) -> LabelSet:
        """Labels of a split: train with the sampled rollouts, val and calibration greedy."""
        c = self.config
        n = {"train": c.label_n, "val": c.val_n, "calibration": c.calibration_n}[split]
        return draw_labels(self.base, c, split, n, c.samples if split == "train" else 0, self.labels)

    def trials(self, split: str, n: int) -> Trials:
        """Trial answers at the boundaries of `n` problems of a split."""
        return draw_trials(self.base, self.config, split, n, self.cache / "labels")

    def items(self, split: str) -> list[Problem]:
        """The problems behind `draw(split)`."""
        n = {"val": self.config.val_n, "calibration": self.config.calibration_n}[split]
        return problems(self.config.tasks, split, self.config.stream, n, self.config.levels)

    def fresh(self, stream: str, n: int, split: str = "test") -> list[Problem]:
        """`n` problems of a stream of their own."""
        return problems(self.config.tasks, split, stream, n, self.config.levels)


def say(*words: object) -> None:
    """Progress, on stderr with the time."""
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def quiet() -> None:
    """Wait while somebody measures speed."""
    while QUIET.exists():
        time.sleep(20)


def fitted(
    setup: Setup,
    name: str,
    change: Mapping[str, Any],
    seed: int,
    train: Callable[[], LabelSet],
    trials: Callable[[], Trials] | None = None,
) -> Fit:
    """Heads with `change` on the config's heads, from the cache or fitted now on `train()`; read-only afterwards."""
    folder = setup.cache / "heads" / f"{name}-{seed}"
    facts = folder / "fit.json"
    if not facts.is_file():
        quiet()
        say(f"fit {name}, seed {seed}")
        began = time.monotonic()
        config = HeadsConfig.model_validate({**setup.config.heads.model_dump(), **change})
        heads, report = fit_heads(train(), config, seed, trials=None if trials is None else trials())
        store.save(folder, heads, None, setup.base.base)
        body = {"val": report["val"], "best_step": report["best_step"], "parameters": report["parameters"]}
        facts.write_text(json.dumps(body | {"seconds": time.monotonic() - began}) + "\n", encoding="utf-8")
        say(f"  {time.monotonic() - began:.0f} s, loss on inner val {report['val']['loss']:.4f}")
    found = store.load(folder, setup.base.base)
    assert found is not None
    return Fit(found[0], json.loads(facts.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Fit:
    """Fitted heads and what the fit reported: val (inner validation losses), best_step, parameters, seconds."""

    heads: MetacogHeads
    report: dict[str, Any]


def read(heads: MetacogHeads, labels: LabelSet) -> dict[str, Any]:
    """`read_greedy` of a label set."""
    return read_greedy(heads, labels)


def best_plans(labels: LabelSet, heads: MetacogHeads) -> dict[str, str]:
    """Per family the strategy with the highest accuracy on these labels (val)."""
    held = read_greedy(heads, labels)
    return best_strategy(held["family"], held["correct"], held["used"], labels.strategies)


def greedy_labels(setup: Setup, items: Sequence[Problem], stream: str) -> LabelSet:
    """One uncapped greedy pass of all strategies, with states: what only heads differ on."""
    return label(setup.base, items, samples=0, seed=f"studies/{stream}", max_batch=setup.config.max_batch)


def keys(family: Sequence[str], level: Sequence[int]) -> list[Key]:
    """(family, level) per row."""
    return list(zip(family, level, strict=True))


def look_up(family: Sequence[str], level: Sequence[int], values: Any) -> LookUp:
    """The (family, level) table of a value."""
    return LookUp.fit(keys(family, level), values)


# -- numbers --------------------------------------------------------------------------------------------------------
def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t-interval over seeds."""
    mean, n = statistics.fmean(values), len(values)
    half = T_975[n] * statistics.stdev(values) / math.sqrt(n) if n in T_975 else math.nan
    return {"mean": mean, "ci": [mean - half, mean + half], "values": list(values)}


def shown(x: Any, digits: int = 3) -> str:
    """A number, an interval or a result of `over_seeds` for a table."""
    if isinstance(x, dict):
        return f"{shown(x['mean'], digits)} {shown(x['ci'], digits)}"
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(shown(v, digits) for v in x) + "]"
    if isinstance(x, (float, np.floating)):
        return f"{x:.{digits}f}"
    return str(x)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One Markdown table on stdout."""
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(shown(x) for x in row) + " |")
    sys.stdout.flush()


def plain(x: Any) -> Any:
    """Numpy out, NaN to None: for JSON."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [plain(v) for v in x]
    if isinstance(x, np.generic):
        return plain(x.item())
    return None if isinstance(x, float) and not math.isfinite(x) else x
