"""Token mode: nodes and records to ids and back, and which ids are trained."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from gnomon.base import seeds
from gnomon.base.errors import DataError
from gnomon.data.encode import decode_nodes, encode_nodes, encode_prompt, encode_record
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.graph import Graph, Node, from_text, resolve, to_text
from gnomon.protocol.tags import KINDS, STRATEGIES, TAGS, THINK
from gnomon.tasks.procedural import LEVELS, REGISTRY, draw, family

WORDS = ("carry", "12", "-3", "=", "x = 7", "é", "<think>", "<|S|>", "|", "▁", "a<b", "#", "no", "€5", "<1", "-")


def random_dag(rng: Random) -> list[Node]:
    """1-30 nodes of any kind, with default, no, one or several parents, far and near, and awkward texts."""
    nodes = []
    for i in range(1, rng.randint(1, 30) + 1):
        some = tuple(rng.sample(range(1, i), rng.randint(0, min(3, i - 1))))
        parents = rng.choice((None, some))
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, 5)))
        nodes.append(Node(rng.choice(list(KINDS)), text, parents))
    return nodes


def plain(nodes: tuple[Node, ...] | list[Node]) -> list[Node]:
    return [replace(node, slip=False) for node in nodes]


def check_lossless(tok: Tokenizer, nodes: list[Node]) -> None:
    ids = encode_nodes(tok, nodes).ids
    back = decode_nodes(tok, ids)
    wanted = plain(nodes)
    edges, lint = resolve(wanted)
    assert list(back.nodes) == wanted
    assert back.edges == edges and back.warnings == lint
    text = from_text(to_text(back.nodes))
    assert text.nodes == back.nodes and text.edges == edges
    assert encode_nodes(tok, text.nodes).ids == ids


def test_random_dags_survive(tok: Tokenizer) -> None:
    rng = seeds.rng("dags")
    for _ in range(2_000):
        check_lossless(tok, random_dag(rng))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_golds_survive(tok: Tokenizer, name: str) -> None:
    for level in LEVELS:
        for strategy in STRATEGIES:
            for index in range(4):
                problem = draw(name, level, "train", "encode", index)
                gold = family(name).gold(problem, strategy, seeds.rng("gold", index))
                check_lossless(tok, list(gold.nodes))
                prompt = encode_prompt(tok, problem.prompt)
                assert prompt[0] == tok.bos and tok.decode(prompt[1:]) == " " + problem.prompt


def test_layout_of_a_node(tok: Tokenizer) -> None:
    """KIND, then a parent token with a relative offset each, then the text with a leading space."""
    nodes = [Node("S", "3+4=7"), Node("S", "x", ()), Node("M", "ok", (1,)), Node("A", "", (1, 3))]
    shown = tok.decode(encode_nodes(tok, nodes).ids)
    assert shown == "<|S|> 3+4=7<|S|><|<|>- x<|M|><|<|>2 ok<|A|><|<|>3<|<|>1"


def test_slips_and_tool_results_are_not_trained(tok: Tokenizer) -> None:
    nodes = [Node("S", "3+4=8", slip=True), Node("M", "fail", (1,)), Node("T", "run 3+4 = 7"), Node("S", "7")]
    block = encode_nodes(tok, nodes)
    silent = tok.decode([i for i, on in zip(block.ids, block.loss, strict=True) if not on])
    assert silent == " 3+4=8 7", "the model writes `=`, the tool what follows (decisions.md §1)"
    trained = [i for i, on in zip(block.ids, block.loss, strict=True) if on]
    assert tok.decode(trained) == "<|S|><|M|><|<|>2 fail<|T|> run 3+4 =<|S|> 7".replace("2 fail", "1 fail")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_record_and_its_mask(tok: Tokenizer, strategy: str) -> None:
    problem = draw("chain", 3, "train", "mask", 5)
    gold = family("chain").gold(problem, strategy, seeds.rng("slip", 1))
    record = encode_record(tok, problem.prompt, strategy, gold.nodes, gold.answer)
    think = tok.decode(encode_nodes(tok, gold.nodes).ids)
    assert tok.decode(record.ids) == (
        f"<bos> {problem.prompt}<plan:{strategy}><think>{think}</think><answer> {gold.answer}</answer><eos>"
    )
    assert len(record.ids) == len(record.loss) and set(record.loss) <= {0, 1}
    trained = tok.decode([i for i, on in zip(record.ids, record.loss, strict=True) if on])
    kept = encode_nodes(tok, gold.nodes)
    shown = tok.decode([i for i, on in zip(kept.ids, kept.loss, strict=True) if on])
    assert trained == f"{shown}</think> {gold.answer}</answer><eos>"
    if strategy == "verify":
        slips = [node for node in gold.nodes if node.slip]
        assert len(kept.loss) - sum(kept.loss) == sum(len(tok.encode(" " + node.text)) for node in slips)
    else:
        assert all(kept.loss)
    if strategy == "direct":
        assert not gold.nodes and f"{THINK}</think>" in tok.decode(record.ids)


def test_some_gold_has_a_slip(tok: Tokenizer) -> None:
    """So that the test above cannot hold by there being none: verify golds carry masked ids."""
    masked = 0
    for index in range(40):
        gold = family("chain").gold(draw("chain", 3, "train", "slips", index), "verify", seeds.rng("slips", index))
        block = encode_nodes(tok, gold.nodes)
        masked += len(block.loss) - sum(block.loss)
    assert masked > 40


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.999])
def test_a_cut_record_trains_the_answer_only(tok: Tokenizer, cut: float) -> None:
    problem = draw("sort", 4, "train", "cut", 2)
    gold = family("sort").gold(problem, "steps", seeds.rng("cut"))
    whole = encode_nodes(tok, gold.nodes).ids
    record = encode_record(tok, problem.prompt, "steps", gold.nodes, gold.answer, cut)
    start, end = record.ids.index(tok.think) + 1, record.ids.index(tok.end_think)
    assert record.ids[start:end] == whole[: int(cut * len(whole))] and end - start < len(whole)
    trained = tok.decode([i for i, on in zip(record.ids, record.loss, strict=True) if on])
    assert trained == f" {gold.answer}</answer><eos>"


def test_decoding_is_total(tok: Tokenizer) -> None:
    """Any ids give a graph: every prefix of a block, and 300 random sequences of kinds, parents and pieces."""
    nodes = [Node("P", "a, b"), Node("S", "1", ()), Node("S", "22", (1, 2)), Node("A", "", (3,))]
    ids = encode_nodes(tok, nodes).ids
    for end in range(len(ids) + 1):
        graph = decode_nodes(tok, ids[:end], truncated=True)
        assert len(graph.nodes) == sum(i in tok.kinds.values() for i in ids[:end])
        assert bool(graph.nodes) == any(w.code == "truncated" for w in graph.warnings)
    rng = seeds.rng("random ids")
    pool = [*tok.kinds.values(), tok.parent, tok.parent, tok.think, *tok.encode("1 2 -3 word 99999999")]
    for _ in range(300):
        graph = decode_nodes(tok, rng.choices(pool, k=rng.randint(0, 20)))
        assert all(1 <= a < b <= len(graph.nodes) for a, b in graph.edges)
    assert decode_nodes(tok, []) == Graph()


def test_lint_of_token_mode(tok: Tokenizer) -> None:
    stray = decode_nodes(tok, [*tok.encode(" hm"), tok.kinds["S"], *tok.encode(" 1")])
    assert [w.code for w in stray.warnings] == ["syntax"] and stray.nodes == (Node("S", "1"),)
    far = decode_nodes(tok, [tok.kinds["S"], tok.parent, *tok.encode("7"), *tok.encode(" x")])
    assert "bad_ref" in [w.code for w in far.warnings] and far.edges == ()


def test_an_unknown_strategy_is_named(tok: Tokenizer) -> None:
    with pytest.raises(DataError, match="strategy 'guess' is unknown; write one of direct, steps"):
        encode_record(tok, "Compute 1 + 1.", "guess", [], "2")


def test_tags_in_a_prompt_open_nothing(tok: Tokenizer) -> None:
    record = encode_record(tok, "Say " + "".join(TAGS), "direct", [], "<answer>")
    assert record.ids.count(tok.think) == record.ids.count(tok.answer) == record.ids.count(tok.end_think) == 1
