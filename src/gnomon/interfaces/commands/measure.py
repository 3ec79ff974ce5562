"""`evaluate`, `sweep` and `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gnomon.base.errors import ConfigError
from gnomon.interfaces import console, options

Flag = Parameter(negative=())


def evaluate(
    *,
    model: str = "nano",
    tasks: str = "all",
    split: str = "test",
    stream: str = "evaluate",
    n: int = 200,
    plan: str = "predicted",
    budget: str = "predicted",
    levels: str = "1-5",
    shots: int | None = None,
    max_batch: int = 64,
    device: str = "cpu",
    json: Annotated[bool, Flag] = False,
) -> None:
    """Accuracy, think tokens, budgets and confidence on held-out problems.

    Args:
        model: A shipped model (nano), smollm2, or a model folder.
        tasks: all, or names separated by commas: chain,count  gym:chain_sum  problems.jsonl
        split: train, val, calibration or test.
        stream: Names the draw; another name, other problems of the same split.
        n: How many problems: tasks in turn, levels uniform.
        plan: direct, steps, verify, decompose, predicted, or best (per family, chosen on val when shipped).
        budget: Think tokens at most: a number, predicted, or none.
        levels: 1-5, 4,5 or 3.
        shots: Worked examples in every prompt, 0 to 3; by default as the family draws it.
        max_batch: Rows decoded together.
        device: cpu or cuda.
        json: Print one JSON object.
    """
    limit, name, chosen = options.budget(budget), options.check_plan(plan), options.levels(levels)
    options.check_draw(tasks, split, n, chosen)
    from gnomon.evaluation.runner import evaluate as measure
    from gnomon.reasoner import Reasoner

    reasoner = Reasoner.load(model, device=device)
    found = measure(
        reasoner, tasks, split, stream, n, name, limit, chosen, shots=shots, cap=reasoner.max_think, max_batch=max_batch
    )
    if json:
        console.emit_json(found.summary)
        return
    s = found.summary
    rows = [(key, s[key], s.get(f"{key}_ci")) for key in _SHOWN if s.get(key) is not None]
    console.table(f"{model}: {n} problems of {tasks} ({split}/{stream})", ("measure", "value", "95 % interval"), rows)
    for key, title in (("by_task", "By task"), ("by_level", "By level"), ("by_plan", "By plan")):
        table = [(k, v["accuracy"], v["accuracy_ci"], v["think_tokens_mean"], v["n"]) for k, v in s[key].items()]
        console.table(title, ("", "accuracy", "95 % interval", "think tokens", "n"), table)


_SHOWN = (
    "accuracy", "think_tokens_mean", "answered_rate", "leakage_rate", "violation_rate", "budget_corr",
    "budget_corr_within_task", "budget_coverage", "auroc", "ece", "brier", "auroc_before", "ece_before", "unique_n",
)  # fmt: skip


def sweep(
    *,
    model: str = "nano",
    tasks: str = "all",
    split: str = "test",
    stream: str = "sweep",
    n: int = 200,
    val_n: int = 200,
    levels: str = "1-5",
    max_batch: int = 64,
    csv: Path | None = None,
    device: str = "cpu",
    json: Annotated[bool, Flag] = False,
) -> None:
    """Quality against budget: 8 budgets x all strategies, greedy, beside the prediction and the fixed policies.

    Args:
        model: A shipped model (nano), smollm2, or a model folder.
        tasks: all, or names separated by commas.
        split: train, val, calibration or test.
        stream: Names the draw.
        n: How many problems.
        val_n: Problems of the val split on which the fixed policies are chosen.
        levels: 1-5, 4,5 or 3.
        max_batch: Rows decoded together.
        csv: Also write one row per point to this file.
        device: cpu or cuda.
        json: Print one JSON object.
    """
    chosen = options.levels(levels)
    options.check_draw(tasks, split, n, chosen)
    from gnomon.evaluation.runner import sweep as measure
    from gnomon.reasoner import Reasoner

    reasoner = Reasoner.load(model, device=device)
    found = measure(reasoner, tasks, split, stream, n, chosen, val_n=val_n, cap=reasoner.max_think, max_batch=max_batch)
    if csv is not None:
        found.to_csv(csv)
        console.say(f"wrote {csv}")
    if json:
        console.emit_json(found.to_json())
        return
    rows = [
        (p.strategy, "unlimited" if p.budget is None else p.budget, p.accuracy, p.accuracy_ci, p.tokens, p.cut)
        for p in found.points
    ]
    columns = ("strategy", "budget", "accuracy", "95 % interval", "think tokens", "cut")
    console.table(f"{model}: {n} problems of {tasks} ({split}/{stream})", columns, rows)
    fixed = [(k, v["accuracy"], v.get("accuracy_ci"), v["tokens"]) for k, v in found.extra.items() if "accuracy" in v]
    console.table("policies", ("policy", "accuracy", "95 % interval", "think tokens"), fixed)


def calibrate(
    *,
    model: Path,
    tasks: str = "all",
    stream: str = "calibrate",
    n: int = 400,
    levels: str = "1-5",
    max_batch: int = 64,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Fit the calibration card of a model folder again, on fresh problems of the calibration split.

    Args:
        model: A folder with a metacognitive layer (RUN/model); its calibration.json is replaced.
        tasks: all, or names separated by commas.
        stream: Names the draw.
        n: How many problems.
        levels: 1-5, 4,5 or 3.
        max_batch: Rows decoded together.
        json: Print one JSON object.
    """
    chosen = options.levels(levels)
    options.check_draw(tasks, "calibration", n, chosen)
    from gnomon.metacognition.calibration import FILE_NAME
    from gnomon.metacognition.store import CONFIG_FILE
    from gnomon.reasoner import Reasoner
    from gnomon.recipes.metacog import MetacogRunConfig, recalibrate

    if not (model / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{model} holds no metacognitive layer ({CONFIG_FILE} is missing); train one with `gnomon train metacog` "
            "and name RUN/model"
        )
    reasoner = Reasoner.load(model)
    config = MetacogRunConfig(
        base=str(model), tasks=tasks, stream=stream, calibration_n=n, levels=chosen, max_batch=max_batch,
        max_think=reasoner.max_think,
    )  # fmt: skip
    card, report = recalibrate(reasoner, config)
    card.save(model / FILE_NAME)
    if json:
        console.emit_json({"card": card.model_dump(exclude={"domain"}), "report": report})
        return
    rows = [(k, v) for k, v in report.items() if isinstance(v, (int, float))]
    console.table(f"{model / FILE_NAME}", ("what", "value"), rows)
