"""`evaluate`, `sweep` and `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gnomon.base.errors import ConfigError, ModelError
from gnomon.interfaces import console, options

if TYPE_CHECKING:
    from gnomon.reasoner import Reasoner

Flag = Parameter(negative=())


def _help(text: str) -> Parameter:
    return Parameter(help=text)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Draw:
    """Options that every measuring command shares: which model, which problems, how many at once."""

    model: Annotated[str, _help("A shipped model (nano), smollm2, or a model folder.")] = "nano"
    tasks: Annotated[str, _help("all, or names separated by commas: chain,count  gym:chain_sum  problems.jsonl")] = (
        "all"
    )
    split: Annotated[str, _help("train, val, calibration or test.")] = "test"
    n: Annotated[int, _help("How many problems: tasks in turn, levels uniform.")] = 200
    levels: Annotated[str, _help("1-5, 4,5 or 3.")] = "1-5"
    max_batch: Annotated[int, _help("Rows decoded together.")] = 64
    rules: Annotated[str, _help("Soft rules, such as slack:share=0.2,loop (slack, margin, sure, loop, cut).")] = ""
    running: Annotated[bool, Flag, _help("Estimate again at boundaries; may close sooner than predicted.")] = False
    modulate: Annotated[bool, Flag, _help("Sample thoughts as the layer's decoding policy says.")] = False
    device: Annotated[str, _help("cpu or cuda.")] = "cpu"
    json: Annotated[bool, Flag, _help("Print one JSON object.")] = False

    def load(self) -> tuple[Reasoner, tuple[int, ...]]:
        """The model and the levels; what can be refused without loading anything is refused first."""
        chosen, rules = options.levels(self.levels), options.rules(self.rules)
        options.check_draw(self.tasks, self.split, self.n, chosen)
        from gnomon.reasoner import Reasoner

        found = Reasoner.load(self.model, device=self.device)
        if self.modulate and (found.decider is None or not found.decider.modulates):
            raise ModelError(
                f"{self.model} has no decoding policy for --modulate; train one: "
                "gnomon train metacog --policy-samples 3"
            )
        found = replace(found, rules=rules, running=self.running, modulate=self.modulate)
        _check_rules(found)
        return found, chosen


def _check_rules(reasoner: Reasoner) -> None:
    """Refuse rules that this model cannot serve before anything is decoded."""
    if reasoner.rules is None:
        return
    request = reasoner.request("rules", "?", plan=reasoner.codec.strategies[0], budget=None)
    layer = reasoner.decider
    asked = any(rule.wants_confidence for rule in reasoner.rules(request))
    if asked and layer is not None and layer.heads.config.closing and not layer.closes:
        raise ModelError(
            f"rule 'sure' needs the calibrated confidence of closing at boundaries; the layer of {reasoner.name} has "
            "learned it, but too few trial answers were there to calibrate it: run `gnomon calibrate --model "
            f"{reasoner.name} --n 1000`"
        )
    reasoner.engine(1).session().rows_of(request)


def evaluate(
    *,
    draw: Draw = Draw(),
    stream: str = "evaluate",
    plan: str = "predicted",
    budget: str = "predicted",
    shots: int | None = None,
    votes: int = 1,
    temperature: float = 0.8,
) -> None:
    """Accuracy, think tokens, budgets and confidence on held-out problems.

    Args:
        stream: Names the draw; another name, other problems of the same split.
        plan: direct, steps, verify, decompose, predicted, or best (per family, chosen on val when shipped).
        budget: Think tokens at most: a number, predicted, or none.
        shots: Worked examples in every prompt, 0 to 3; by default as the family draws it.
        votes: Sampled paths per problem; the majority answers (self-consistency). 1 decodes greedily.
        temperature: Of the sampled paths.
    """
    limit, name = options.budget(budget), options.check_plan(plan)
    if votes < 1 or (votes > 1 and temperature <= 0):
        raise ConfigError(
            f"--votes {votes} --temperature {temperature}: write at least 1 vote, and a temperature above 0"
        )
    reasoner, chosen = draw.load()
    if votes > 1:
        _voted(reasoner, draw, stream, votes, name, limit, chosen, shots, temperature)
        return
    from gnomon.evaluation.runner import evaluate as measure

    found = measure(
        reasoner, draw.tasks, draw.split, stream, draw.n, name, limit, chosen, shots=shots, cap=reasoner.max_think,
        max_batch=draw.max_batch,
    )  # fmt: skip
    if draw.json:
        console.emit_json(found.summary)
        return
    s = found.summary
    rows = [(key, s[key], s.get(f"{key}_ci")) for key in _SHOWN if s.get(key) is not None]
    console.table(
        f"{draw.model}: {draw.n} problems of {draw.tasks} ({draw.split}/{stream})",
        ("measure", "value", "95 % interval"),
        rows,
    )
    for key, title in (("by_task", "By task"), ("by_level", "By level"), ("by_plan", "By plan")):
        table = [(k, v["accuracy"], v["accuracy_ci"], v["think_tokens_mean"], v["n"]) for k, v in s[key].items()]
        console.table(title, ("", "accuracy", "95 % interval", "think tokens", "n"), table)


def _voted(
    reasoner: Reasoner, draw: Draw, stream: str, votes: int, plan: str, limit: options.Budget, levels: tuple[int, ...],
    shots: int | None, temperature: float,
) -> None:  # fmt: skip
    """`evaluate --votes`: the majority of sampled paths."""
    from gnomon.decoding.search import Votes
    from gnomon.evaluation.votes import evaluate_votes
    from gnomon.tasks.demonstrations import with_shots
    from gnomon.tasks.procedural import problems

    items = problems(draw.tasks, draw.split, stream, draw.n, levels)
    if shots is not None:
        items = [with_shots(p, shots) for p in items]
    reflect = "verify" if "verify" in reasoner.codec.strategies else None
    found = evaluate_votes(
        reasoner, items, Votes(votes, reflect=reflect), plan, limit, temperature, max_batch=draw.max_batch
    )
    if draw.json:
        console.emit_json(found)
        return
    rows = [(k, v, found.get(f"{k}_ci")) for k, v in found.items() if not k.endswith("_ci") and k != "by_task"]
    console.table(f"{draw.model}: majority of {votes} paths", ("measure", "value", "95 % interval"), rows)
    console.table("By task", ("", "accuracy", "n"), [(k, v["accuracy"], v["n"]) for k, v in found["by_task"].items()])


_SHOWN = (
    "accuracy", "think_tokens_mean", "answered_rate", "leakage_rate", "violation_rate", "budget_corr",
    "budget_corr_within_task", "budget_coverage", "auroc", "ece", "brier", "auroc_before", "ece_before", "unique_n",
)  # fmt: skip


def sweep(*, draw: Draw = Draw(), stream: str = "sweep", val_n: int = 200, csv: Path | None = None) -> None:
    """Quality against budget: 8 budgets x all strategies, greedy, beside the prediction and the fixed policies.

    With --rules every point is decoded under them, at every budget anew (several times the work of a plain sweep).

    Args:
        stream: Names the draw; another name, other problems of the same split.
        val_n: Problems of the val split on which the fixed policies are chosen.
        csv: Also write one row per point to this file.
    """
    reasoner, chosen = draw.load()
    from gnomon.evaluation.runner import sweep as measure

    found = measure(
        reasoner, draw.tasks, draw.split, stream, draw.n, chosen, val_n=val_n, cap=reasoner.max_think,
        max_batch=draw.max_batch,
    )  # fmt: skip
    if csv is not None:
        found.to_csv(csv)
        console.say(f"wrote {csv}")
    if draw.json:
        console.emit_json(found.to_json())
        return
    rows = [
        (p.strategy, "unlimited" if p.budget is None else p.budget, p.accuracy, p.accuracy_ci, p.tokens, p.cut)
        for p in found.points
    ]
    columns = ("strategy", "budget", "accuracy", "95 % interval", "think tokens", "cut")
    console.table(f"{draw.model}: {draw.n} problems of {draw.tasks} ({draw.split}/{stream})", columns, rows)
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
    for lack in (report["running"] or {}).get("missing", ()):
        console.say(lack)
