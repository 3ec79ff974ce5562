"""What phases B and C do to nano: gate and adapters, then on-policy rounds with the last block unfrozen.

    python benchmarks/study_phases.py --seed 0 --variant full|gate|adapters --out FILE

    python benchmarks/study_phases.py --tasks knights,programs --levels 3,4,5 --label-train 1500 --c-mode all --out FILE

Every arm starts at the shipped layer (with --label-train N: at heads fitted here on N problems) and ends
with a card fitted on what the model does then. All are tested greedily
under predicted plan and budget on the same problems of a stream that no choice was made on; the reference is the best
fixed strategy per family of the shipped model, unlimited, chosen on val. Differences are paired by problem.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.attempts import Job, run
from gnomon.base.seeds import numpy_generator
from gnomon.metacognition.steerer import SteerConfig
from gnomon.reasoner import Reasoner
from gnomon.recipes import metacog, phases
from gnomon.tasks.procedural import problems
from gnomon.training.adapt import AdaptConfig
from gnomon.training.objectives import LossWeights
from gnomon.training.phase_fit import PhaseConfig

VARIANTS = {
    "full": SteerConfig(),
    "gate": SteerConfig(adapter_layers=()),
    "adapters": SteerConfig(gate_layer=None),
}


def interval(values: Any, name: str) -> list[float]:
    """Mean and 95 % bootstrap interval."""
    draws = numpy_generator("study-phases", name).integers(len(values), size=(2000, len(values)))
    means = np.asarray(values, dtype=float)[draws].mean(1)
    return [float(np.mean(values)), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]


def measured(reasoner: Reasoner, items: Any) -> dict[str, Any]:
    """Right and think tokens of every problem under predicted plan and budget, greedy."""
    found = [group[0] for group in run(reasoner, [Job(p, seed="study-phases") for p in items])]
    return {
        "right": np.array([a.correct for a in found], dtype=float),
        "used": np.array([a.trace.used for a in found], dtype=float),
        "over": sum(a.trace.overshoot for a in found),
        "plans": {p: sum(a.trace.plan == p for a in found) / len(found) for p in reasoner.codec.strategies},
    }


def fixed(reasoner: Reasoner, items: Any) -> dict[str, Any]:
    """The reference: best strategy of the problem's family, unlimited; and the cheapest right one (hindsight)."""
    names = reasoner.codec.strategies
    jobs = [Job(p, s, None, use_prediction=False, seed="study-phases") for p in items for s in names]
    found = [group[0] for group in run(reasoner, jobs)]
    rows = [found[i : i + len(names)] for i in range(0, len(found), len(names))]
    best = [row[names.index(reasoner.best_plan[p.task])] for p, row in zip(items, rows, strict=True)]
    cheapest = [
        min((a.trace.used for a in row if a.correct), default=b.trace.used) for row, b in zip(rows, best, strict=True)
    ]
    return {
        "right": np.array([a.correct for a in best], dtype=float),
        "used": np.array([a.trace.used for a in best], dtype=float),
        "oracle_used": np.array(cheapest, dtype=float),
    }


def by_plan(reasoner: Reasoner, items: Any) -> dict[str, list[float]]:
    """Accuracy and think tokens of every plan without a cap, on the first 400 problems: what the base learned."""
    found = {}
    for name in reasoner.codec.strategies:
        jobs = [Job(p, name, None, use_prediction=False, seed="study-phases") for p in items[:400]]
        part = [group[0] for group in run(reasoner, jobs)]
        found[name] = [sum(a.correct for a in part) / len(part), sum(a.trace.used for a in part) / len(part)]
    return found


def by_cell(right: Any, items: Any) -> dict[str, float]:
    """Accuracy per family and level."""
    names = np.array([f"{p.task} {p.level}" for p in items])
    return {str(name): float(right[names == name].mean()) for name in np.unique(names)}


def against(arm: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """Paired: points gained and the share of think tokens spent."""
    return {
        "accuracy": interval(arm["right"], name),
        "think_tokens": float(arm["used"].mean()),
        "gained": interval(arm["right"] - other["right"], name),
        "tokens_share": float(arm["used"].sum() / other["used"].sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=VARIANTS, default="full")
    parser.add_argument("--n", type=int, default=2600, help="test problems")
    parser.add_argument("--problems", type=int, default=2500)
    parser.add_argument("--label-n", type=int, default=1000)
    parser.add_argument("--b-steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--c-rounds", type=int, default=1)
    parser.add_argument("--c-steps", type=int, default=100)
    parser.add_argument("--calibration-n", type=int, default=2000)
    parser.add_argument("--val-n", type=int, default=650)
    parser.add_argument("--stream", default="phases-test-1")
    parser.add_argument("--split", default="test", help="val while settings are being chosen")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--levels", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2, 3, 4, 5))
    parser.add_argument("--label-train", type=int, default=0, help="problems that phase A is fitted on; 0 = as shipped")
    parser.add_argument("--c-mode", choices=("last_k", "all"), default="last_k")
    parser.add_argument("--base-lr-scale", type=float, default=0.05)
    parser.add_argument("--cache", type=Path, help="of labels; default OUT.labels")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.monotonic()
    cache = args.cache or args.out.with_suffix(".labels")
    shipped = Reasoner.load("nano")
    items = problems(args.tasks, args.split, args.stream, args.n, args.levels)
    config = metacog.MetacogRunConfig(
        stream=f"study-phases/{args.seed}", calibration_n=args.calibration_n, val_n=args.val_n, seed=args.seed,
        tasks=args.tasks, levels=args.levels, label_n=args.label_train or 20,
    )  # fmt: skip
    if args.label_train:  # the labels are the same for all seeds
        shared = config.model_copy(update={"stream": "study-phases"})
        shipped = metacog.train(replace(shipped, decider=None), shared, cache).reasoner
    reference = fixed(shipped, items)
    arms = {"A": measured(shipped, items) | {"by_plan": by_plan(shipped, items)}}
    draw = phases.Draw(args.tasks, config.levels, config.stream, None, None, 64, args.seed)
    b = PhaseConfig(problems=args.problems, label_n=args.label_n, steps=args.b_steps, batch=args.batch)
    c = b.model_copy(
        update={"rounds": args.c_rounds, "steps": args.c_steps, "capped": 0.5,
                "adapt": AdaptConfig(mode=args.c_mode, base_lr_scale=args.base_lr_scale)}
    )  # fmt: skip
    told: list[dict[str, Any]] = []
    reasoner = phases.with_steerer(shipped, VARIANTS[args.variant], args.seed)
    assert shipped.decider is not None and shipped.decider.card is not None
    order = shipped.decider.card.cost_order
    for letter, phase in (("B", b), ("C", c)):
        if not phase.rounds:
            continue
        reasoner = phases.run_phase(
            reasoner, phase, draw, letter, LossWeights(), lambda facts: None if "step" in facts else told.append(facts)
        )
        carded, _ = metacog._with_card(reasoner, order, config, cache)
        arms[letter] = measured(carded, items) | {"by_plan": by_plan(carded, items)}
        reasoner = replace(carded)
        print(f"{args.variant} seed {args.seed} {letter}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    body = {
        "seed": args.seed, "variant": args.variant, "n": args.n, "seconds": time.monotonic() - began,
        "reference": {"accuracy": float(reference["right"].mean()), "think_tokens": float(reference["used"].mean()),
                      "oracle_tokens": float(reference["oracle_used"].mean())},
        "arms": {k: {"vs_fixed": against(v, reference, k), "vs_A": against(v, arms["A"], k + "A"), "over": v["over"],
                     "plans": v["plans"], "by_plan": v["by_plan"], "by_cell": by_cell(v["right"], items),
                     "oracle_share": float((reference["used"] - v["used"]).sum()
                                           / (reference["used"] - reference["oracle_used"]).sum())}
                 for k, v in arms.items()},
        "rounds": told,
    }  # fmt: skip
    args.out.write_text(json.dumps(body, default=str))
    print(json.dumps({k: {n: v[n] for n in ("vs_A", "by_plan", "by_cell")} for k, v in body["arms"].items()}))


if __name__ == "__main__":
    main()
