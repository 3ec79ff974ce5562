"""Blocks -> text, every span with its role. Who chose each token travels with it and becomes the loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gnomon.base.errors import unknown
from gnomon.protocol.graph import Node, to_text
from gnomon.protocol.tags import ANSWER, END_ANSWER, END_THINK, PLAN, THINK, Role


@dataclass(frozen=True)
class Segment:
    """A span of text. tag: a literal tag, inserted by id and never tokenized; loss: whether it is trained."""

    text: str
    role: Role
    tag: bool = False
    loss: bool = False


def render(prompt: str, strategy: str, think: Sequence[Node] | str, answer: str) -> tuple[Segment, ...]:
    """One record in text mode: prompt, strategy, think block, answer.

    The engine appends strategy, start tag and answer tag (forced, no loss); the end tags are the model's own. A slip
    is shown without loss, the result of a tool call belongs to the tool. Raises UnknownNameError.
    """
    if strategy not in PLAN:
        raise unknown("strategy", strategy, PLAN)
    body = [Segment(think, "sampled", loss=True)] if isinstance(think, str) else render_nodes(think)
    return (
        Segment(prompt, "prompt"),
        Segment(PLAN[strategy], "forced", tag=True),
        Segment(THINK, "forced", tag=True),
        *(s for s in body if s.text),
        Segment(END_THINK, "sampled", tag=True, loss=True),
        Segment(ANSWER, "forced", tag=True),
        Segment(answer, "sampled", loss=True),
        Segment(END_ANSWER, "sampled", tag=True, loss=True),
    )


def render_nodes(nodes: Sequence[Node]) -> list[Segment]:
    """Think nodes in text mode; joined, the segments are exactly `graph.to_text(nodes)`."""
    out: list[Segment] = []
    lines = to_text(nodes).split("\n") if nodes else []
    for number, (node, line) in enumerate(zip(nodes, lines, strict=True)):
        newline = "\n" if number + 1 < len(nodes) else ""
        head = line[: len(line) - len(node.text)]
        out.append(Segment(head, "sampled", loss=True))
        if node.kind == "T" and " = " in node.text:
            call, _, result = node.text.partition(" = ")
            out += [Segment(call + " = ", "sampled", loss=True), Segment(result + newline, "tool")]
        else:
            out.append(Segment(node.text, "sampled", loss=not node.slip))
            out.append(Segment(newline, "sampled", loss=True))
    return [segment for segment in out if segment.text]


def text_of(segments: Sequence[Segment]) -> str:
    """The plain text of the segments."""
    return "".join(segment.text for segment in segments)
