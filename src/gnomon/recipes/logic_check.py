"""The small evaluation inside a pretraining run: a few logic puzzles, answered by the model as it stands (row T4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from gnomon.attempts import Job
from gnomon.attempts import run as attempt
from gnomon.base.stopping import StopRequested
from gnomon.data.codec import OwnCodec
from gnomon.data.tokenizer import Tokenizer
from gnomon.model.decoder import Decoder
from gnomon.model.native import own_backbone
from gnomon.reasoner import from_parts
from gnomon.tasks.procedural import problems

LOGIC: Final = ("knights", "boolean", "kinship", "belief")
CAP: Final = 96  # think tokens; an untrained model would write to the end of its context
ANSWER_TOKENS: Final = 16


def logic_check(
    decoder: Decoder,
    tok: Tokenizer,
    tasks: Sequence[str],
    levels: Sequence[int],
    n: int,
    cap: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """`n` val puzzles of the logic families among `tasks` (all of `tasks` when there is none), plan `steps`, greedy.

    cap: think tokens, None = CAP. stop(): ends the evaluation early; then there are no results.
    Each: {task, level, prompt, think, answer, gold, correct, used}. The decoder is back in train mode afterwards.
    """
    names = [t for t in LOGIC if t in tasks] or list(tasks)
    items = problems(names, "val", "logic-check", n, levels)

    def polled(_: int) -> None:
        if stop():
            raise StopRequested

    decoder.eval()
    try:
        reasoner = from_parts("training", own_backbone(decoder), OwnCodec(tok))
        jobs = [Job(item, "steps", CAP if cap is None else cap, use_prediction=False) for item in items]
        found = attempt(reasoner, jobs, max_answer_tokens=ANSWER_TOKENS, on_done=polled)
    except StopRequested:
        return []
    finally:
        decoder.train()
    rows = []
    for item, (one,) in zip(items, found, strict=True):
        think = reasoner.read(one.trace).think
        facts = {"task": item.task, "level": item.level, "prompt": item.prompt, "think": think, "answer": one.answer}
        rows.append({**facts, "gold": item.answer, "correct": one.correct, "used": one.trace.used})
    return rows
