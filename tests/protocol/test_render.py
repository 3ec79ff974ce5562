"""Rendering: round trip over random graphs, roles and losses."""

from __future__ import annotations

import random

import pytest

from gnomon.base import seeds
from gnomon.base.errors import UnknownNameError
from gnomon.protocol.graph import Node, from_text, resolve, to_text
from gnomon.protocol.parser import segment, split, text_splitter
from gnomon.protocol.render import render, text_of
from gnomon.protocol.tags import KINDS, STRATEGIES

TEXTS = ["", "3 plus 4 is 7", "a<b 3", "<- no", "S2<1", "calc 3*4 = 12", "fail: 1 < 2", "ünï ✓", "a  b", "= 4"]


def dag(rng: random.Random) -> list[Node]:
    nodes = []
    for i in range(1, rng.randint(1, 9) + 1):
        earlier = list(range(1, i))
        parents = rng.choice([None, (), tuple(rng.sample(earlier, rng.randint(0, len(earlier))))])
        nodes.append(Node(rng.choice("PSTMDRF"), rng.choice(TEXTS), parents))
    if rng.random() < 0.5:
        nodes.append(Node("A", "", (len(nodes),)))
    return nodes


def test_two_thousand_random_graphs_come_back_from_a_rendered_record() -> None:
    for i in range(2000):
        rng = seeds.rng("render-test", i)
        nodes, strategy = dag(rng), rng.choice(STRATEGIES)
        text = text_of(render("Why?", strategy, nodes, "yes"))
        parts = segment(text, i)
        graph = from_text(text[parts.think.start : parts.think.end])
        assert graph.nodes == tuple(nodes) and graph.warnings == ()
        assert graph.edges == resolve(nodes)[0]
        assert (parts.strategy, text[slice(*parts.prompt)], text[slice(*parts.answer)]) == (strategy, "Why?", "yes")
        assert [n.kind for n in parts.nodes] == [n.kind for n in nodes]
        assert split(text, text_splitter()).think == to_text(nodes)


def test_roles_say_who_chose_each_span() -> None:
    nodes = [Node("S", "1"), Node("T", "calc 3*4 = 12"), Node("S", "2 is 3", slip=True), Node("M", "fail")]
    spans = render("Q", "verify", nodes, "12")
    assert [s.role for s in spans if s.tag] == ["forced", "forced", "sampled", "forced", "sampled"]
    assert [s.text for s in spans if s.role == "tool"] == ["12\n"]
    trained = "".join(s.text for s in spans if s.loss and not s.tag)
    assert trained == "S1 1\nT2 calc 3*4 = S3 \nM4 fail12"
    assert not any(s.loss for s in spans if s.role != "sampled")
    assert "2 is 3" in text_of(spans)


def test_an_empty_block_is_valid_and_unknown_strategies_are_named() -> None:
    parts = segment(text_of(render("Q", "direct", [], "1")))
    assert parts.think.start == parts.think.end and parts.nodes == ()
    with pytest.raises(UnknownNameError, match="did you mean 'direct'"):
        render("Q", "dirct", [], "1")
    assert set(KINDS) == set("PSTMDRFA")
