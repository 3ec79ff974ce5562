"""What training "closing here is right" does to the other outputs of the heads: both kinds on the same val labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_base import Setup, over_seeds, shown, table
from study_heads import METRICS, measure, plan_numbers

from gnomon.base.seeds import numpy_generator
from gnomon.metacognition.heads import MetacogHeads
from gnomon.training.heads_fit import read_greedy

DRAWS = 400
Read = dict[str, Any]


def others(setup: Setup, groups: Mapping[str, Sequence[MetacogHeads]]) -> dict[str, Any]:
    """Per metric and kind the seeds' mean, and their difference (second − first) over seeds and over problems."""
    assert setup.base.decider is not None and setup.base.decider.card is not None
    card, labels = setup.base.decider.card, setup.draw("val")
    label = plan_numbers(labels, card.cost_order)
    reads = {name: [read_greedy(h, labels) for h in heads] for name, heads in groups.items()}
    return compared(reads, label, card.plan_price or 0.0)


def compared(reads: Mapping[str, Sequence[Read]], label: NDArray[np.int64], price: float) -> dict[str, Any]:
    """The table of two kinds of heads with as many seeds each; label [N]: the cheapest solver, -1 where none.

    difference: t-interval over pairs of seeds. over_problems: 95 % of a paired bootstrap of the seeds' mean difference,
    problems drawn once for all heads.
    """
    every = np.arange(len(label))
    numbers = {name: [measure(r, label, price, every) for r in rs] for name, rs in reads.items()}
    old, new = reads.values()
    drawn = numpy_generator("others")
    gaps: dict[str, list[float]] = {k: [] for k in METRICS}
    for _ in range(DRAWS):
        rows = drawn.integers(0, len(label), len(label))
        pairs = [
            (measure(a, label, price, rows), measure(b, label, price, rows)) for a, b in zip(old, new, strict=True)
        ]
        for k, found in gaps.items():
            found.append(float(np.mean([b[k] - a[k] for a, b in pairs])))
    first, second = numbers.values()
    return {
        k: {**{name: over_seeds([x[k] for x in found]) for name, found in numbers.items()},
            "difference": over_seeds([b[k] - a[k] for a, b in zip(first, second, strict=True)]),
            "over_problems": np.nanquantile(gaps[k], (0.025, 0.975)).tolist()}
        for k in METRICS
    }  # fmt: skip


def show_others(body: Mapping[str, Mapping[str, Any]], n: int) -> None:
    """One table: kinds, difference, its two intervals."""
    names = [k for k in next(iter(body.values())) if k not in ("difference", "over_problems")]
    table(
        f"The other outputs on val labels, n = {n}: seeds' mean [95 % over seeds]",
        ("what", *names, "difference", "difference over problems, paired"),
        [(METRICS[k], *(v[name] for name in names), shown(v["difference"], 4), shown(v["over_problems"], 4))
         for k, v in body.items()],
    )  # fmt: skip
