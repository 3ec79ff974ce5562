"""Worked examples in the prompt: other problems of the same family with their answers, then the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gnomon.tasks.problem import Problem


def with_demonstrations(problem: Problem, examples: Sequence[Problem]) -> Problem:
    """The same problem with `examples` shown before it, one line each."""
    lines = [f"{example.prompt} Answer: {example.answer}" for example in examples]
    return replace(problem, prompt="\n".join([*lines, problem.prompt]))
