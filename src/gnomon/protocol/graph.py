"""The think grammar TG as data: a think block is a list of nodes, and every list of nodes is a DAG.

Grammar (introspection.md §1), text mode, one node per line:

    node := KIND ID DEPS (SP text)?        DEPS := "" previous node | "<-" no parent | ("<" ID)+ these parents
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gnomon.protocol.tags import KINDS

_LINE = re.compile(r"^([PSTMDRFA])([1-9][0-9]{0,5})(<-|(?:<[1-9][0-9]{0,5})*)(?: (.*))?$")


@dataclass(frozen=True)
class Node:
    """One node of a think block.

    parents: None = the default edge from the previous node (node 1: none); () = no parent; else 1-based ordinals.
    slip: a planted mistake; it is shown to the model as context but carries no loss.
    """

    kind: str
    text: str = ""
    parents: tuple[int, ...] | None = None
    slip: bool = False


@dataclass(frozen=True)
class Warning_:
    """A lint finding: closed codes `syntax, duplicate_id, id_gap, bad_ref, truncated, after_answer`."""

    code: str
    line: int


@dataclass(frozen=True)
class Graph:
    """A parsed block: nodes, resolved edges (parent, child) as 1-based ordinals, warnings."""

    nodes: tuple[Node, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()
    warnings: tuple[Warning_, ...] = field(default=())


def resolve(nodes: Sequence[Node]) -> tuple[tuple[tuple[int, int], ...], tuple[Warning_, ...]]:
    """Edges and lint of a node list. A parent that is not an earlier node is dropped (`bad_ref`)."""
    edges: list[tuple[int, int]] = []
    warnings: list[Warning_] = []
    for i, node in enumerate(nodes, start=1):
        parents: Iterable[int] = ((i - 1,) if i > 1 else ()) if node.parents is None else node.parents
        for p in parents:
            if 1 <= p < i:
                edges.append((p, i))
            else:
                warnings.append(Warning_("bad_ref", i))
        if node.kind == "A" and i < len(nodes):
            warnings.append(Warning_("after_answer", i))
    return tuple(edges), tuple(warnings)


def to_text(nodes: Sequence[Node]) -> str:
    """Nodes -> text mode, one line per node, ids consecutive from 1; no trailing newline."""
    lines = []
    for i, node in enumerate(nodes, start=1):
        if "\n" in node.text:
            raise ValueError(f"node {i} has a newline in its text; a node is one line: {node.text!r}")
        if node.kind not in KINDS:
            raise ValueError(f"node {i} has kind {node.kind!r}; known: {' '.join(KINDS)}")
        if node.parents is None:
            deps = ""
        else:
            deps = "".join(f"<{p}" for p in node.parents) or "<-"
        lines.append(f"{node.kind}{i}{deps}" + (f" {node.text}" if node.text else ""))
    return "\n".join(lines)


def from_text(text: str, truncated: bool = False) -> Graph:
    """Text mode -> Graph. Total: any string parses; what does not fit becomes a warning."""
    nodes: list[Node] = []
    warnings: list[Warning_] = []
    renumber: dict[int, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            warnings.append(Warning_("syntax", number))
            continue
        kind, raw_id, deps, body = match.groups()
        ident = int(raw_id)
        if ident in renumber:
            warnings.append(Warning_("duplicate_id", number))
            continue
        if ident != len(renumber) + 1:
            warnings.append(Warning_("id_gap", number))
        parents: tuple[int, ...] | None
        if deps == "":
            parents = None
        elif deps == "<-":
            parents = ()
        else:
            kept = []
            for ref in (int(x) for x in deps[1:].split("<")):
                if ref in renumber:
                    kept.append(renumber[ref])
                else:
                    warnings.append(Warning_("bad_ref", number))
            parents = tuple(kept)
        renumber[ident] = len(nodes) + 1
        nodes.append(Node(kind, body or "", parents))
    edges, lint = resolve(nodes)
    if truncated and nodes:
        warnings.append(Warning_("truncated", len(nodes)))
    return Graph(tuple(nodes), edges, tuple(warnings) + lint)
