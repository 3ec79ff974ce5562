"""Prompts, think nodes and whole records as ids. Legend: ids are plain Python ints; masks are 0/1 per id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gnomon.base.errors import DataError
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.graph import Graph, Node, Warning_, resolve
from gnomon.protocol.tags import NO_PARENT


@dataclass(frozen=True)
class Encoded:
    """ids and, per id, whether predicting it is trained (`loss`)."""

    ids: list[int]
    loss: list[int]


def encode_prompt(tok: Tokenizer, text: str) -> list[int]:
    """<bos> and the prompt's text."""
    return [tok.bos, *tok.encode(" " + text)]


def encode_nodes(tok: Tokenizer, nodes: Sequence[Node]) -> Encoded:
    """Token mode of TG: KIND, relative parents, text. A planted slip has loss 0 on its text, as has a tool result."""
    ids: list[int] = []
    loss: list[int] = []
    for number, node in enumerate(nodes, start=1):
        head = [tok.kinds[node.kind]]
        if node.parents is not None:
            offsets = [str(number - p) for p in node.parents] or [NO_PARENT]
            for offset in offsets:
                head += [tok.parent, *tok.encode(offset)]
        given, _, result = node.text.partition(" = ") if node.kind == "T" else (node.text, "", "")
        # The model writes the call and its `=`; what stands behind it comes from the tool.
        body = tok.encode(f" {given} =" if result else f" {given}") if given else []
        forced = tok.encode(" " + result) if result else []
        ids += head + body + forced
        trained = 0 if node.slip else 1
        loss += [1] * len(head) + [trained] * len(body) + [0] * len(forced)
    return Encoded(ids, loss)


def decode_nodes(tok: Tokenizer, ids: Sequence[int], truncated: bool = False) -> Graph:
    """Token mode -> Graph. Total: what comes before the first KIND is skipped with a warning `syntax`."""
    kinds = {ident: kind for kind, ident in tok.kinds.items()}
    starts = [i for i, ident in enumerate(ids) if ident in kinds]
    warnings: list[Warning_] = []
    if ids and (not starts or starts[0] > 0):
        warnings.append(Warning_("syntax", 0))
    nodes: list[Node] = []
    for number, start in enumerate(starts, start=1):
        end = starts[number] if number < len(starts) else len(ids)
        parents, body = _parents(tok, ids[start + 1 : end], number, warnings)
        text = tok.decode(body).strip().replace("\n", " ")
        nodes.append(Node(kinds[ids[start]], text, parents))
    edges, lint = resolve(nodes)
    if truncated and nodes:
        warnings.append(Warning_("truncated", len(nodes)))
    return Graph(tuple(nodes), edges, tuple(warnings) + lint)


def _parents(
    tok: Tokenizer, ids: Sequence[int], number: int, warnings: list[Warning_]
) -> tuple[tuple[int, ...] | None, Sequence[int]]:
    """Split a node's ids into absolute parents (None = default edge) and its text ids."""
    if not ids or ids[0] != tok.parent:
        return None, ids
    parents: list[int] = []
    i = 0
    while i < len(ids) and ids[i] == tok.parent:
        j = i + 1
        label = ""
        while j < len(ids) and ids[j] != tok.parent and not tok.piece(ids[j]).startswith("▁") and len(label) < 6:
            label += tok.decode([ids[j]])
            j += 1
        if label.isascii() and label.isdigit() and 0 < int(label) < number:
            parents.append(number - int(label))
        elif label != NO_PARENT:
            warnings.append(Warning_("bad_ref", number))
        i = j
    return tuple(parents), ids[i:]


def encode_record(
    tok: Tokenizer, prompt: str, strategy: str, nodes: Sequence[Node], answer: str, cut: float | None = None
) -> Encoded:
    """<bos> prompt <plan:k> <think> nodes </think> <answer> text </answer> <eos> with its loss mask.

    Loss falls on the nodes (slips excepted), on </think>, the answer, </answer> and <eos>; never on the prompt, the
    plan, <think> or <answer>, which the engine always appends. cut in [0, 1): keep that share of the think tokens
    and train the answer alone (decisions.md §1).
    """
    if strategy not in tok.plan:
        raise DataError(f"strategy {strategy!r} is unknown; write one of {', '.join(tok.plan)}.")
    head = [*encode_prompt(tok, prompt), tok.plan[strategy], tok.think]
    block = encode_nodes(tok, nodes)
    think, loss, close = block.ids, block.loss, 1
    if cut is not None:
        think = think[: int(cut * len(think))]
        loss, close = [0] * len(think), 0
    text = tok.encode(" " + answer)
    ids = [*head, *think, tok.end_think, tok.answer, *text, tok.end_answer, tok.eos]
    mask = [0] * len(head) + loss + [close, 0] + [1] * (len(text) + 2)
    return Encoded(ids, mask)
