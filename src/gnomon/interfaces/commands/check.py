"""`check`: black-box tests that a user runs on a model."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from gnomon.base.errors import ConfigError
from gnomon.interfaces import console

Flag = Parameter(negative=())
BREACH = 1


def budget(
    model: str,
    *,
    n: int = 1000,
    max_batch: int = 32,
    seed: str = "check",
    answered: float = 0.995,
    device: str = "cpu",
    json: Annotated[bool, Flag] = False,
) -> int:
    """Is the think budget of a model kept? Counts from outside, with joins, cancels and mixed budgets; exit 1 if not.

    Args:
        model: A shipped model (nano), smollm2, or a model folder.
        n: How many randomised requests.
        max_batch: Rows decoded together.
        seed: Names the random requests.
        answered: The least share of answers that are not empty and not cut.
        device: cpu or cuda.
        json: Print one JSON object.
    """
    if "://" in model:
        raise ConfigError(
            f"{model} is a URL, and servers cannot be checked yet; name the model that it serves: "
            "gnomon check budget nano, or a model folder"
        )
    for name, value, least in (("n", n, 1), ("max-batch", max_batch, 1)):
        if value < least:
            raise ConfigError(f"--{name} {value}: give at least {least}")
    if not 0.0 <= answered <= 1.0:
        raise ConfigError(f"--answered {answered}: it is a share between 0 and 1")
    from gnomon.conformance.budget import RULES, check_budget
    from gnomon.conformance.local import EngineClient
    from gnomon.reasoner import Reasoner

    client = EngineClient.of(Reasoner.load(model, device=device), max_batch)
    with console.Stages(quiet=json) as stages:
        found = check_budget(client, n, seed, answered, on_done=stages("requests", n))
    if json:
        console.emit_json({"model": model, **found.to_json()})
    else:
        facts = {k: v for k, v in found.to_json().items() if isinstance(v, (int, float))}
        console.table(f"{model}: {n} requests", ("measure", "value"), list(facts.items()))
        broken = [(rule, count, RULES[rule]) for rule, count in found.violations.items() if count]
        if broken:
            console.table("broken rules", ("rule", "times", "meaning"), broken)
    for line in found.examples:
        console.say(line)
    return 0 if found.ok else BREACH


def backbone(
    model: str,
    *,
    n: int = 16,
    seed: str = "check",
    device: str = "cpu",
    json: Annotated[bool, Flag] = False,
) -> int:
    """Does a base model decode soundly here? Slots, batches, taps, padding, tags against plain passes; exit 1 if not.

    Args:
        model: A shipped model (nano), smollm2, a model folder or a .gguf file.
        n: How many random rows.
        seed: Names the random rows.
        device: cpu or cuda.
        json: Print one JSON object.
    """
    if n < 2:
        raise ConfigError(f"--n {n}: give at least 2, a row is compared with itself beside another")
    from gnomon.conformance.backbone import GROUPS, MEANING, check_backbone
    from gnomon.reasoner import Reasoner

    reasoner = Reasoner.load(model, device=device)
    with console.Stages(quiet=json) as stages:
        found = check_backbone(reasoner, n, seed, on_done=stages("checks", len(GROUPS)))
    if json:
        console.emit_json({"model": model, **found.to_json()})
        return 0 if found.ok else BREACH
    rows = [
        (name, c.ok, f"{c.worst:.4g}", f"{c.allowed:.4g}", "; ".join(filter(None, (MEANING[name], c.note))))
        for name, c in found.checks.items()
    ]
    title = f"{model}: {found.family}, {found.backbone}, context {found.context}, {n} rows"
    console.table(title, ("check", "ok", "worst", "allowed", "what"), rows)
    for line in found.notes:
        console.say(f"put right: {line}")
    return 0 if found.ok else BREACH
