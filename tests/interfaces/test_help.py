"""Every verb says what each of its options is for."""

from __future__ import annotations

import pytest

from gnomon.interfaces import cli

VERBS = [
    "demo", "ask", "chat", "train pretrain", "train metacog", "data prepare", "data inspect", "tokenizer train",
    "calibrate", "evaluate", "sweep", "validate", "report", "runs", "control", "check budget", "check backbone",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option_with_its_meaning(verb: str) -> None:
    command = cli.build()
    for word in verb.split():
        command = command[word]
    assert len(command.help) > 20
    arguments = [a for a in command.assemble_argument_collection(parse_docstring=True) if a.show]
    assert arguments
    silent = [a.name for a in arguments if not (a.parameter.help or "").strip()]
    assert not silent, f"{verb}: no help for {silent}"
