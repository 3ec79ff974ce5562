"""The black-box budget check passes on sound models and convicts every kind of broken one, by the right rule."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from tests.decoding.tiny import ATOMIC, TEXT, Tiny

from gnomon.base.errors import ConfigError
from gnomon.conformance.budget import (
    IMPOSSIBLE,
    RULES,
    Ask,
    BudgetReport,
    Completion,
    check_budget,
    draw,
    judge,
    tags_in,
)
from gnomon.conformance.local import EngineClient, completion
from gnomon.decoding.budget import BudgetConfig
from gnomon.decoding.engine import Engine
from gnomon.protocol.graph import Graph
from gnomon.protocol.layout import Layout
from gnomon.protocol.tags import ANSWER, END_THINK, THINK
from gnomon.protocol.trace import Chunk, Request, Trace
from gnomon.reasoner import Reasoner

N = 40


class Client:
    """The shipped model, asked once; `spoil` then changes what arrives, `closeness` what `gap` says."""

    def __init__(self, inner: EngineClient) -> None:
        self.inner, self.strategies, self.predicts = inner, inner.strategies, inner.predicts
        self.known: dict[tuple[Ask, ...], list[Completion]] = {}
        self.spoil: Callable[[Sequence[Ask], list[Completion]], list[Completion]] = lambda asks, found: found
        self.closeness: float | None = None

    def ask(self, asks: Sequence[Ask]) -> list[Completion]:
        key = tuple(asks)
        if key not in self.known:
            self.known[key] = self.inner.ask(asks)
        return self.spoil(asks, self.known[key])

    def gap(self, ask: Ask, one: Completion, other: Completion) -> float | None:
        return self.closeness if self.closeness is not None else self.inner.gap(ask, one, other)


@pytest.fixture(scope="module")
def nano() -> Reasoner:
    return Reasoner.load("nano")


@pytest.fixture(scope="module")
def recorded(nano: Reasoner) -> Client:
    return Client(EngineClient.of(nano, 16))


@pytest.fixture
def client(recorded: Client) -> Client:
    fresh = Client(recorded.inner)
    fresh.known = recorded.known
    return fresh


def spoiled(client: Client, change: Callable[[Ask, Completion], Completion]) -> BudgetReport:
    """The report on a client whose third whole sample is changed."""

    def spoil(asks: Sequence[Ask], found: list[Completion]) -> list[Completion]:
        by_id, out = {a.id: a for a in asks}, list(found)
        at = [i for i, c in enumerate(out) if c.answered and c.think_tokens and not c.cancelled][2]
        out[at] = change(by_id[out[at].id], out[at])
        return out

    client.spoil = spoil
    return check_budget(client, N)


def broken(report: BudgetReport) -> set[str]:
    assert report.ok == (not any(report.violations.values())) and set(report.violations) == set(RULES)
    assert bool(report.examples) == (not report.ok)
    return {rule for rule, count in report.violations.items() if count}


# -- sound models -------------------------------------------------------------------------------------------------
def test_nano_keeps_its_budgets(client: Client) -> None:
    report = check_budget(client, N)
    assert report.ok and broken(report) == set(), report.examples
    assert (report.overshoot_tokens, report.leaked, report.requests) == (0, 0, N)
    assert report.answered_rate >= 0.995 and report.neighbours_identical == 1.0
    assert report.completions >= N - report.refused and report.neighbours_compared == 8


class Words:
    """A codec without a vocabulary: prompts become ids by a checksum, ids become words."""

    strategies = ("direct", "steps")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def encode_prompt(self, text: str) -> list[int]:
        return [19 + zlib.crc32(word.encode()) % 13 for word in text.split()[:40]]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    def think_graph(self, ids: Sequence[int], truncated: bool) -> Graph:
        raise AssertionError("conformance reads no graphs")


LEANS = {"atomic": {2: 1.2, 4: 1.5, 5: 0.4}, "text": {12: 1.5, 13: 1.5, 2: 1.0, 4: 1.2, 18: 0.5, 0: 0.3}}


@pytest.mark.parametrize(("name", "layout"), [("atomic", ATOMIC), ("text", TEXT)])
def test_random_models_with_tags_of_one_and_of_several_tokens_keep_theirs(name: str, layout: Layout) -> None:
    engine = Engine(Tiny("conformance", context=240, lean=LEANS[name]), layout, max_batch=16)
    report = check_budget(EngineClient(engine, Words(layout)), 300, answered=0.0)
    assert report.ok, (report.violations, report.examples)
    assert report.cancelled > 3 and report.completions > 300 and report.neighbours_compared > 30


# -- broken engines -----------------------------------------------------------------------------------------------
def test_a_controller_that_allows_one_token_too_many_is_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    cap = BudgetConfig.cap.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(BudgetConfig, "cap", property(lambda self: cap(self) + 1))
    engine = Engine(Tiny("over", context=240, lean={2: -9.0, 5: -9.0}), ATOMIC, max_batch=16)
    report = check_budget(EngineClient(engine, Words(ATOMIC)), 60, answered=0.0)
    assert report.violations["overshoot"] == report.overshoot_tokens > 20
    assert report.violations["leaked"] == 0


def test_rows_that_share_randomness_are_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a row's stream comes from how many rows there are: neighbours change the text."""
    rows: list[str] = []

    def key(seed: int, ident: str, sample: int) -> int:
        rows.append(ident)
        return len(rows)

    monkeypatch.setattr("gnomon.decoding.sampling.stream_key", key)
    engine = Engine(Tiny("shared", context=240, lean=LEANS["atomic"]), ATOMIC, max_batch=16)
    report = check_budget(EngineClient(engine, Words(ATOMIC)), 64, answered=0.0)
    assert broken(report) == {"neighbours"} and report.neighbours_identical < 0.7


def test_a_model_that_may_write_the_end_tag_into_its_answer_is_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = Layout.masked
    monkeypatch.setattr(Layout, "masked", lambda self, inside: masked(self, inside) - {2})
    monkeypatch.setattr("gnomon.decoding.budget.BudgetState.banned", lambda self, reopen=True: ())
    engine = Engine(Tiny("leaky", context=240, lean={2: 2.0, 4: 0.5}), ATOMIC, max_batch=16)
    report = check_budget(EngineClient(engine, Words(ATOMIC)), 40, answered=0.0)
    assert "leaked" in broken(report) and report.leaked > 5


# -- broken deliveries --------------------------------------------------------------------------------------------
def test_one_think_token_too_many_is_an_overshoot_of_one(client: Client) -> None:
    def change(ask: Ask, c: Completion) -> Completion:
        return replace(c, think_tokens=c.report["budget"]["effective"] + 1)

    report = spoiled(client, change)
    assert {"overshoot"} <= broken(report) <= {"overshoot", "count"}
    assert report.overshoot_tokens >= 1 and report.violations["overshoot"] >= 1


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("leaked", lambda ask, c: replace(c, answer=f"{c.answer}{END_THINK}")),
        ("leaked", lambda ask, c: replace(c, think=f"{ANSWER} {c.think}")),
        ("leaked", lambda ask, c: replace(c, misplaced=2)),
        ("answered", lambda ask, c: replace(c, answer=" ")),
        ("answered", lambda ask, c: replace(c, closed=False)),
        ("count", lambda ask, c: replace(c, think_tokens=c.think_tokens - 1)),
        ("record", lambda ask, c: replace(c, differs="another text")),
        ("stop", lambda ask, c: replace(c, report={**c.report, "stop": "tired"})),
        ("effective", lambda ask, c: replace(c, report={**c.report, "budget": {"used": c.think_tokens}})),
        ("lost", lambda ask, c: replace(c, sample=7)),
        ("lost", lambda ask, c: replace(c, id="nobody")),
    ],
)
def test_each_kind_of_breach_is_found_by_its_rule(
    client: Client, rule: str, change: Callable[[Ask, Completion], Completion]
) -> None:
    assert broken(spoiled(client, change)) - {"neighbours"} == {rule}


def test_empty_answers_throughout_are_a_rate_of_zero(client: Client) -> None:
    client.spoil = lambda asks, found: [replace(c, answer="") for c in found]
    report = check_budget(client, N)
    assert report.answered_rate == 0.0 and broken(report) == {"answered"}
    client.spoil = lambda asks, found: [Completion(a.id, refused="full") for a in asks]
    refused = check_budget(client, N)
    assert refused.refused == N and refused.answered_rate == 0.0 and broken(refused) == {"answered"}


def test_answers_that_depend_on_neighbours_are_found_and_ties_only_counted(client: Client) -> None:
    def spoil(asks: Sequence[Ask], found: list[Completion]) -> list[Completion]:
        capped = sum(a.budget is not None for a in asks)
        first = asks[0].id
        return [replace(c, tokens=(*c.tokens[:-1], 900 + capped)) if c.id == first else c for c in found]

    client.spoil = spoil
    report = check_budget(client, N)
    assert broken(report) == {"neighbours"} and report.neighbours_identical == 7 / 8
    ((_, gap),) = report.neighbour_exceptions
    assert gap is not None and gap >= 1e-4
    client.closeness = 1e-6
    tied = check_budget(client, N)
    assert tied.ok and tied.neighbours_identical == 7 / 8 and len(tied.neighbour_exceptions) == 1


def test_a_budget_that_no_context_holds_must_be_refused() -> None:
    class Yes:
        strategies, predicts = ("steps",), False

        def ask(self, asks: Sequence[Ask]) -> list[Completion]:
            return [fine(a, s) for a in asks for s in range(a.n)]

        def gap(self, ask: Ask, one: Completion, other: Completion) -> float | None:
            return None

    report = check_budget(Yes(), 400)
    asked = [a for a in draw(400, "check", ("steps",), False) if a.budget == IMPOSSIBLE]
    assert broken(report) == {"accepted"} and report.violations["accepted"] == len(asked) > 0


def fine(ask: Ask, sample: int = 0) -> Completion:
    budget = {"requested": ask.budget, "effective": 0, "used": 0}
    return Completion(ask.id, sample, answer="7", closed=True, report={"budget": budget, "stop": "hard"})


# -- the parts ------------------------------------------------------------------------------------------------------
def delivered(ids: Sequence[int], regions: str, budget: int = 4) -> Completion:
    """ids behind the prompt with one region letter each (p, t for tag, k for think, a) through `completion`."""
    names = {"p": "plan", "t": "tag", "k": "think", "a": "answer"}
    chunks = [
        Chunk("r", 0, i, "sampled" if r in "ka" else "forced", names[r]) for i, r in zip(ids, regions, strict=True)
    ]  # type: ignore[arg-type]
    think = (2, 2 + regions.count("k") - (2 in ids))
    answer = (ids.index(3) + 1, len(ids) - 1) if 3 in ids else (len(ids), len(ids))
    trace = Trace(
        id="r", sample=0, prompt_ids=(20,), ids=tuple(ids), roles=tuple(c.role for c in chunks),
        logprobs=(0.0,) * len(ids), think_span=think, answer_span=answer, plan="steps", plan_source="requested",
        stop="natural", finish="end", budget_requested=budget, budget_effective=budget, budget_source="requested",
        used=think[1] - think[0], forced=0,
    )  # fmt: skip
    return completion(Words(ATOMIC), chunks, trace)


def test_what_arrives_is_split_and_counted_again() -> None:
    good = delivered([7, 1, 20, 21, 2, 3, 25, 26, 4], "ptkkktaaa")
    assert (good.think_tokens, good.think, good.answer, good.closed) == (2, "w20 w21", "w25 w26", True)
    assert (good.misplaced, good.differs) == (0, "") and judge(Ask("r", "x", budget=4), good) == []
    over = delivered([7, 1, 20, 21, 22, 2, 3, 25, 4], "ptkkkktaa", budget=2)
    assert [(b.rule, b.tokens) for b in judge(Ask("r", "x", budget=2), over)] == [("overshoot", 1)]
    leak = delivered([7, 1, 20, 2, 3, 25, 2, 26, 4], "ptkktaaaa")
    assert leak.misplaced == 1 and leak.differs
    thought = delivered([7, 1, 20, 21, 2, 3, 25, 4], "ptkaktaa")
    assert thought.misplaced > 0
    endless = delivered([7, 1, 20, 21], "ptkk")
    assert not endless.closed and endless.answer == "" and not endless.answered
    reopened = delivered([7, 1, 20, 2, 3, 25, 1, 26, 4], "ptkktaaaa")
    assert reopened.misplaced > 0 and not reopened.closed


def test_tags_in_a_text_count_unless_the_prompt_spells_them() -> None:
    assert tags_in(f"a {THINK} b", f"{END_THINK}{END_THINK}") == 3
    assert tags_in("", f"it says {END_THINK}", f"what is {END_THINK}?") == 0
    assert tags_in("plain", "text < 3") == 0


def test_questions_cover_every_kind_and_repeat_with_the_seed() -> None:
    asks = draw(900, "cover", ("direct", "steps"), True)
    assert asks == draw(900, "cover", ("direct", "steps"), True) != draw(900, "other", ("direct", "steps"), True)
    assert len({a.id for a in asks}) == 900 and asks[:200] == draw(900, "cover", ("direct", "steps"), True)[:200]
    assert {0, 1, 2, None, "predicted", IMPOSSIBLE} <= {a.budget for a in asks}
    assert {a.n for a in asks} == {1, 2, 3} and {a.plan for a in asks} == {"direct", "steps", "predicted"}
    assert (
        any(a.join for a in asks) and any(a.cancel_after == 0 for a in asks) and any(a.temperature == 0 for a in asks)
    )
    assert any(END_THINK in a.prompt for a in asks)
    plain = draw(300, "cover", ("steps",), False)
    assert {a.plan for a in plain} == {"steps"} and "predicted" not in {a.budget for a in plain}
    with pytest.raises(ConfigError, match="at least one"):
        check_budget(EngineClient(Engine(Tiny(), ATOMIC), Words(ATOMIC)), 0)


def test_the_gap_tells_a_near_tie_from_a_leak(nano: Reasoner) -> None:
    """The distance of the two best logits, as one full pass of the model gives it, where two runs part."""
    client = EngineClient.of(nano, 4)
    ask = Ask("g", "Compute 34 + 27 - 15.", plan="steps")
    (one,) = client.ask([ask])
    at = len(one.tokens) // 2
    other = replace(one, tokens=(*one.tokens[:at], one.tokens[at] + 1, *one.tokens[at + 1 :]))
    gap = client.gap(ask, one, other)
    assert gap is not None and gap > 1e-4
    assert client.gap(ask, one, one) is None
    (trace,) = nano.engine(1).run([Request("g", tuple(nano.codec.encode_prompt(ask.prompt)), "steps", None)])
    assert one.tokens == trace.ids
