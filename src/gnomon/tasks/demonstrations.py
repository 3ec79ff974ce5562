"""Worked examples in the prompt: other problems of the same family with their answers, then the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gnomon.base.errors import ConfigError
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import REGISTRY, draw
from gnomon.tasks.rules import with_examples

MOST = 3


def with_demonstrations(problem: Problem, examples: Sequence[Problem]) -> Problem:
    """The same problem with `examples` shown before it, one line each."""
    lines = [f"{example.prompt} Answer: {example.answer}" for example in examples]
    return replace(problem, prompt="\n".join([*lines, problem.prompt]))


def with_shots(problem: Problem, shots: int) -> Problem:
    """The problem with 0–3 worked examples from the train split; an invented rule with so many of its own examples.

    Raises ConfigError for another number, or for a problem of a family that gnomon cannot draw from.
    """
    if not 0 <= shots <= MOST:
        raise ConfigError(f"shots = {shots}; a prompt shows 0 to {MOST} worked examples")
    if problem.task == "rules":
        return with_examples(problem, shots)
    if problem.task not in REGISTRY:
        raise ConfigError(f"worked examples need a built-in family; {problem.task!r} is none")
    stream = f"{problem.stream}/{problem.split}/shots"
    examples = [draw(problem.task, problem.level, "train", f"{stream}/{k}", problem.index) for k in range(shots)]
    return with_demonstrations(problem, examples)
