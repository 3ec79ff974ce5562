"""What went wrong in other budget controllers: the table of budget-rules.md, one named test per row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from tests.decoding.test_budget import END, LONG, THINK, config, opened, run
from tests.decoding.test_slack import decode, steady
from tests.decoding.tiny import ATOMIC, TEXT, Tiny

from gnomon.base import seeds
from gnomon.base.errors import BudgetError, TagError
from gnomon.decoding.budget import BudgetState
from gnomon.decoding.engine import Engine
from gnomon.decoding.room import allot
from gnomon.decoding.slack import SlackStop
from gnomon.evaluation import metrics
from gnomon.evaluation.records import EvalRecord, summarise
from gnomon.metacognition.calibration import Card
from gnomon.protocol.graph import from_text
from gnomon.protocol.layout import Layout
from gnomon.protocol.parser import collect, split, text_splitter, token_splitter
from gnomon.protocol.tags import ANSWER, END_ANSWER, END_THINK
from gnomon.protocol.tags import THINK as THINK_TEXT
from gnomon.protocol.trace import Chunk, Request
from gnomon.reasoner import shipped

# Models that never begin an end tag by themselves.
ENDLESS = {2: -30.0, 5: -30.0, 4: -30.0}
ENDLESS_TEXT = {12: -30.0, 18: -30.0, 0: -30.0}
CASES = [pytest.param(ATOMIC, ENDLESS, id="atomic"), pytest.param(TEXT, ENDLESS_TEXT, id="text")]


def ask(name: str, budget: int | None, **more: object) -> Request:
    prompt = tuple(seeds.rng("failures", name).randrange(19, 32) for _ in range(7))
    values = {"prompt_ids": prompt, "plan": "steps", "budget": budget, "max_answer_tokens": 6}
    return Request(name, **{**values, **more})  # type: ignore[arg-type]


# -- tags -----------------------------------------------------------------------------------------------------------
def test_01_a_begun_end_tag_is_completed_not_restarted() -> None:
    state = opened(2, end=LONG)
    actions = run(state, [10, 11, 7, 10, 10])
    assert [a.token for a in actions] == [10, 11, 7, 8, 9]
    assert [a.kind for a in actions] == ["continue"] * 3 + ["force"] * 2
    assert (state.used, state.forced, state.cause) == (2, 2, "hard")


def test_01_other_spellings_of_the_end_tag_close_and_are_completed() -> None:
    state = opened(2, end=LONG, end_also=((17, 9),))
    assert [a.token for a in run(state, [10, 11, 17, 10])] == [10, 11, 17, 9]
    natural = opened(5, end=LONG, end_also=((17, 9),))
    run(natural, [10, 17, 9])
    assert (natural.used, natural.cause) == (1, "natural")


def test_02_a_transition_precedes_the_end_tag_and_does_not_hide_the_bare_one() -> None:
    state = opened(1, end=LONG, transition=(30, 31))
    assert [a.token for a in run(state, [10] * 9)] == [10, 30, 31, 7, 8, 9]
    assert (state.used, state.forced) == (1, 5)
    bare = opened(9, end=LONG, transition=(30, 31))
    run(bare, [10, *LONG])
    assert bare.cause == "natural"
    with pytest.raises(TagError, match="already contains"):
        config(1, end=LONG, transition=(30, *LONG))


# -- blocks ---------------------------------------------------------------------------------------------------------
def test_03_a_second_block_draws_on_what_is_left() -> None:
    state = opened(5)
    run(state, [10, 11, 12, END])
    state.step(40)
    state.step(THINK)
    assert state.open and state.left == 2
    run(state, [10, 11, 12, 13])
    assert (state.used, state.blocks, state.cause) == (5, 2, "hard")
    state.step(THINK)
    assert not state.needs_choice  # a third one closes at once


def test_04_an_end_tag_of_an_old_turn_in_the_prompt_changes_nothing() -> None:
    state = BudgetState(config(2))
    state.prefill((50, THINK, 10, 11, 12, END, 51, END, 52))
    assert (state.phase, state.used) == ("idle", 0)
    state.advance(THINK, "forced")
    run(state, [10, 11, 12])
    assert (state.used, state.cause) == (2, "hard")


def test_05_a_block_opened_by_the_template_or_the_model_is_seen() -> None:
    template = BudgetState(config(2, lead=(13,)))
    template.prefill((50, THINK, 13))
    assert (template.phase, template.used, template.forced) == ("counting", 0, 0)
    run(template, [13, 10, 11])  # a sampled newline is an ordinary token
    assert (template.used, template.cause) == (2, "hard")
    model = BudgetState(config(1, think=(1, 4)))
    for choice in (50, 1, 4):
        model.step(choice)
    assert model.phase == "counting"
    run(model, [10, 10])
    assert model.used == 1


def test_06_zero_is_zero_and_n_is_n() -> None:
    for n in range(6):
        state = opened(n)
        run(state, [10] * 20)
        assert (state.used, state.cause) == (n, "hard")


# -- batches and paths ----------------------------------------------------------------------------------------------
def test_07_states_share_nothing() -> None:
    rule = config(2)
    one, two = BudgetState(rule), BudgetState(rule)
    for state in (one, two):
        state.advance(THINK, "forced")
    run(one, [10, 10, 10])
    assert one.phase == "closed" and two.phase == "counting" and two.used == 0 and two.forced == 0


@pytest.mark.parametrize(("layout", "lean"), CASES)
def test_07_a_forced_tag_never_reaches_another_row(layout: Layout, lean: dict[int, float]) -> None:
    """Cuts at every step beside rows that think on; every row is what it is alone, and only cut rows hold force."""
    engine = Engine(Tiny("leak", lean=lean, context=80), layout, max_batch=16)
    cut = [ask(f"cut-{n}", n) for n in range(6)]
    free = [ask(f"free-{n}", None, temperature=1.0, seed=n) for n in range(3)]
    together = engine.run([request for n in range(3) for request in (cut[2 * n], free[n], cut[2 * n + 1])])
    assert len(together) == 9
    for trace in together:
        request = next(r for r in (*cut, *free) if r.id == trace.id)
        (alone,) = engine.run([request])
        assert trace.ids == alone.ids and trace.roles == alone.roles
        start, end = trace.think_span
        limit = engine.check(request).limit
        assert trace.used == (limit if request.budget is None else request.budget)
        forced = [i for i, role in enumerate(trace.roles) if role == "forced" and start <= i < end]
        assert forced == list(range(start + trace.used, end)), "forced tokens stand behind the last thought only"


@pytest.mark.parametrize(("layout", "lean"), CASES)
def test_08_every_path_keeps_the_rule(layout: Layout, lean: dict[int, float]) -> None:
    """Greedy, sampled, truncated sampling, n > 1, shared prompts, streamed, resumed: B think tokens, then the cut."""
    engine, seen = Engine(Tiny("paths", lean=lean), layout, max_batch=8), list[Chunk]()
    prefix = (25, 26)
    asked = [
        ask("greedy", 5),
        ask("sampled", 5, temperature=1.3),
        ask("cut-off", 5, temperature=0.7, top_k=3, top_p=0.6),
        ask("many", 5, temperature=1.0, n=5),
        ask("resumed", 5, think_prefix=prefix),
        ask("resumed-to-the-end", 2, think_prefix=prefix),
        ask("zero", 0, n=2),
    ]
    traces = engine.run(asked, sink=seen.append)
    assert len(traces) == 12
    for trace in traces:
        want = next(r.budget for r in asked if r.id == trace.id)
        assert (trace.used, trace.stop, trace.overshoot) == (want, "hard", 0)
        told = [c for c in seen if (c.id, c.sample) == (trace.id, trace.sample)]
        assert tuple(c.token for c in told) == trace.ids
        thought = [c for c in told if c.region == "think" and c.role == "sampled"]
        assert len(thought) == want


def test_08_advance_alone_counts_what_step_counts() -> None:
    """A fast path that only reports tokens cannot lose count: what it did shows in `used`."""
    stepped, told = opened(None, end=LONG), opened(None, end=LONG)
    for token in [10, 7, 8, 10, 7, 7, 8, 9]:
        stepped.step(token)
        told.advance(token)
    assert stepped.mark() == told.mark() and stepped.used == 5 and stepped.phase == "closed"


def test_09_a_second_end_tag_is_masked_in_the_answer() -> None:
    single = opened(5)
    run(single, [10, END])
    assert single.banned() == (END,)
    long = opened(5, end=LONG)
    run(long, [10, *LONG])
    assert long.banned() == ()
    long.step(7)
    long.step(8)
    assert long.banned() == (9,)
    assert opened(5).banned() == ()


def test_10_every_forced_token_is_named_for_the_model_and_the_parser() -> None:
    state = opened(0, end=LONG, transition=(30,))
    actions = run(state, [10] * 9)
    assert [a.token for a in actions] == [30, *LONG] and state.forced == len(actions)


@pytest.mark.parametrize(("layout", "lean"), CASES)
def test_10_forced_tokens_pass_through_cache_and_parser(layout: Layout, lean: dict[int, float]) -> None:
    """The answer behind a cut is the one that the model gives to the very same ids, and the splitter sees both."""
    engine = Engine(Tiny("forced", lean=lean), layout)
    trace, other = engine.run([ask("r", 4), ask("s", 0)])
    for each in (trace, other):
        parts = split(each.ids, token_splitter(layout))
        assert (parts.think, parts.answer) == (each.think_ids, each.answer_ids)
        assert not set(layout.end_think) <= set(parts.answer)
    # Through the cache: forced ids that arrive by another road (a resumed thought) give the same answer.
    (again,) = engine.run([ask("r", 4, think_prefix=trace.think_ids[:4])])
    assert again.answer_ids == trace.answer_ids and again.forced == trace.forced > 0


# -- the soft layer -------------------------------------------------------------------------------------------------
def test_11_the_soft_layer_cannot_move_the_wall() -> None:
    state = opened(4)
    for cap in (5000, 4, 1000):
        assert not state.lower_cap(cap, "slack")
    run(state, [10] * 50)
    assert (state.used, state.cause) == (4, "hard")


def test_12_a_ramp_closes_where_a_grace_period_only_waits() -> None:
    """The model would close by itself three logits later than it ever gets: waiting in the last share meets the wall
    in the middle of a node, the ramp closes behind a whole one."""
    budget, logits = 42, steady(100, gap=3.0)
    waiting, eased = opened(budget), opened(budget)
    cut = decode(waiting, [], logits)
    closed = decode(eased, [SlackStop(0.5, 8.0).fresh()], logits)
    assert (waiting.cause, eased.cause) == ("hard", "slack")
    assert closed == [*cut[: eased.used], END] and eased.used < budget - 5
    node = 10  # ends a node in `steady`
    assert cut[waiting.used - 1] != node and closed[eased.used - 1] == node


def test_13_a_cut_neither_falls_into_a_tool_result_nor_runs_half_a_call() -> None:
    state = opened(3)
    run(state, [10, 11, 12])
    for token in (60, 61, END, 62):  # the result arrives whole at the cap; nothing is forced between
        state.advance(token, "tool")
        assert state.phase == "counting"
    assert (state.used, state.forced) == (3, 4)
    assert state.step(13).token == END and state.cause == "hard"
    begun = opened(2, end=LONG)
    run(begun, [10, 11, 7])
    with pytest.raises(BudgetError, match="cannot be inserted into an end tag"):
        begun.advance(60, "tool")
    half = from_text("S1 3 + 4 = 7\nT2 calc(3 +", truncated=True)
    assert [w.code for w in half.warnings] == ["truncated"] and half.nodes[-1].kind == "T"
    assert "=" not in half.nodes[-1].text, "no result stands where the call was cut"


@pytest.mark.parametrize(("layout", "lean"), CASES)
def test_14_thinking_cannot_eat_the_answer(layout: Layout, lean: dict[int, float]) -> None:
    engine = Engine(Tiny("starved", lean=lean, context=100), layout)
    request = ask("r", None, max_answer_tokens=None)
    room = engine.check(request)
    (trace,) = engine.run([request])
    assert (trace.used, trace.stop) == (room.limit, "limit") and trace.answer_tokens > 0
    assert room.reserve >= 32 and len(trace.prompt_ids) + room.overhead + room.limit + room.reserve <= 100
    (tight,) = engine.run([ask("t", room.limit, max_answer_tokens=None)])
    assert tight.used == room.limit and tight.answer_tokens > 0
    with pytest.raises(BudgetError, match=f"a budget of {room.limit + 1} does not fit.*leaves {room.limit}"):
        engine.run([ask("r", room.limit + 1, max_answer_tokens=None)])


def test_14_a_budget_that_starves_the_answer_is_refused_with_numbers() -> None:
    room = allot(context=512, prompt=100, overhead=12, budget=None)
    assert (room.limit, room.reserve) == (300, 100)
    assert allot(512, 100, 12, 300).limit == 300
    with pytest.raises(BudgetError, match=r"301 does not fit.*512.*100.*12.*reserve 100.*leaves 300"):
        allot(512, 100, 12, 301)
    assert allot(100, 10, 10, None).reserve == 32
    assert allot(512, 100, 12, None, max_answer=200).limit == 200
    with pytest.raises(BudgetError, match="no room to answer"):
        allot(60, 40, 5, None)
    with pytest.raises(BudgetError, match="the prompt has 600 tokens but the context holds 512"):
        allot(512, 600, 12, None)


def test_15_twenty_tool_calls_share_one_budget() -> None:
    state = opened(30, scope="tool_loop")
    spent = 0
    for call in range(20):
        before = state.used
        run(state, [10, 11, 12, 13, END])
        spent += state.used - before
        assert state.used <= 30
        if call >= 8:
            assert not state.needs_choice or state.left == 0
        state.new_turn(tool_result=True)
        assert state.used == min(30, 4 * (call + 1))
        state.advance(THINK, "forced")
    assert spent == 30
    state.new_turn()  # the user speaks: a new loop
    assert state.used == 0


# -- cost -----------------------------------------------------------------------------------------------------------
class Counted(int):
    """A token that counts how often a dictionary looks at it."""

    looks = 0

    def __hash__(self) -> int:
        Counted.looks += 1
        return int.__hash__(self)


@pytest.mark.parametrize("tag", [(END,), LONG, (10, 11, 10, 11, 7), (10, 10, 10, 10, 9)])
def test_16_the_cost_of_a_token_does_not_grow_with_the_trace(tag: tuple[int, ...]) -> None:
    """Controller and splitter; also where the thought keeps beginning the tag."""
    state = opened(None, end=tag)
    splitter = token_splitter(replace(TEXT, think=(THINK,), end_think=tag), start="think")
    thought, costs = [10, 11, 10, 10, 10, 11, 12, 10], []
    for _ in range(4):
        Counted.looks = 0
        for _ in range(200):
            for token in thought:
                state.step(Counted(token))
            splitter.feed(map(Counted, thought))
        costs.append(Counted.looks)
    assert costs[1] == costs[2] == costs[3] <= 2 * 200 * len(thought) * (2 * len(tag) + 1)
    assert state.used + state.held == 4 * 200 * len(thought)


# -- streams and reports --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layout", "lean"), CASES)
def test_17_a_stream_in_any_chunks_neither_leaks_nor_hides(layout: Layout, lean: dict[int, float]) -> None:
    """What the engine streams, cut anywhere, splits into what the trace says. By text: tests/protocol/test_parser."""
    gentle = lean | dict.fromkeys((*layout.end_think, *layout.end_answer), 1.5)
    engine = Engine(Tiny("chunks", lean=gentle), layout)
    for trace in engine.run([ask(f"r{n}", n, temperature=1.2) for n in (0, 1, 4, 30)]):
        for size in range(1, 17):
            splitter = token_splitter(layout)
            pieces = [p for at in range(0, len(trace.ids), size) for p in splitter.feed(trace.ids[at : at + size])]
            pieces += splitter.close()
            parts = collect(pieces, splitter)
            assert (parts.think, parts.answer) == (trace.think_ids, trace.answer_ids)


def test_18_truncated_thinking_is_no_answer() -> None:
    cut = split("I think it is 7, but", text_splitter(start="think", bare=True))
    assert (cut.think, cut.answer, cut.truncated) == ("I think it is 7, but", "", True)
    reopened = split(f"{THINK_TEXT}a{END_THINK}{ANSWER}7{THINK_TEXT}or", text_splitter())
    assert reopened.answer == "" and reopened.truncated


def test_18_a_prefilled_closed_block_leaves_the_answer_open() -> None:
    state = BudgetState(config(5))
    state.prefill((50, THINK, 10, END), turn_start=1)
    assert (state.phase, state.used, state.cause) == ("closed", 1, "natural")
    assert not state.open and END in state.banned()
    parts = split("the answer", text_splitter(start="answer", bare=True))
    assert (parts.think, parts.answer, parts.truncated) == ("", "the answer", False)


def test_19_used_forced_and_total_agree_with_a_recount() -> None:
    state = opened(4, end=LONG)
    tokens = [(a.token, a.kind) for a in run(state, [7, 10, 7, 8, 11, 10, 10, 10])]
    assert tokens == [(7, "continue"), (10, "continue"), (7, "continue"), (8, "continue"), (9, "force")]
    assert state.used == state.total == 2 and state.forced == 1 and state.cause == "hard"


def test_20_the_effective_cap_is_readable_and_echoed() -> None:
    state = opened(7, limit=5)
    assert state.cap == 5 and state.left == 5 and state.cap_cause == "limit"
    (trace,) = Engine(Tiny("echo", lean=ENDLESS), ATOMIC).run([ask("r", 3)])
    budget = trace.report()["budget"]
    assert (budget["requested"], budget["effective"], budget["used"], budget["source"]) == (3, 3, 3, "requested")
    for bad in (-1, 2.5, True, "many"):
        with pytest.raises(BudgetError, match="given"):
            ask("r", bad)  # type: ignore[arg-type]


def test_21_a_cut_never_says_natural() -> None:
    for soft in ("slack", "confidence", "loop"):
        state = opened(9)
        state.lower_cap(2, soft)  # type: ignore[arg-type]
        run(state, [10] * 5)
        assert state.cause == soft
    cut = opened(2)
    run(cut, [10] * 5)
    assert cut.cause == "hard"
    eased = opened(9, end=LONG)
    run(eased, [10])
    eased.lean()
    run(eased, list(LONG))
    assert eased.cause == "slack"
    (trace,) = Engine(Tiny("says", lean=ENDLESS), ATOMIC).run([ask("r", 3)])
    assert trace.report()["stop"] == "hard" and not trace.closed_naturally


# -- measuring ------------------------------------------------------------------------------------------------------
RECORD = EvalRecord("p", "sort", 1, "steps", correct=True, used=4, stop="natural", answered=True)


def test_22_cut_items_are_counted_as_censored() -> None:
    stops = ["natural", "hard", "limit", "slack", "natural", "loop"]
    records = [replace(RECORD, prompt_id=str(n), stop=stop, correct=False) for n, stop in enumerate(stops)]
    summary = summarise(records, draws=5)
    assert (summary["n"], summary["censored_n"]) == (6, 4) and summary["stop"]["hard"] == 1
    assert sum(summary["stop"].values()) == 6


def test_23_mode_collapse_shows_in_the_rates_by_difficulty() -> None:
    level = np.repeat([1, 3, 5], 40)
    healthy = metrics.mode_rates(np.repeat([0, 0.5, 1], 40) > np.tile(np.arange(40) / 40, 3), level)
    assert healthy == {"1": 0.0, "3": 0.5, "5": 1.0, "spread": 1.0}
    always, never = metrics.mode_rates(np.ones(120), level), metrics.mode_rates(np.zeros(120), level)
    assert always == {"1": 1.0, "3": 1.0, "5": 1.0, "spread": 0.0} and never["spread"] == 0.0
    assert math.isnan(metrics.mode_rates([], [])["spread"])


def test_24_blocks_are_valid_empty_missing_or_truncated() -> None:
    texts = [
        f"{THINK_TEXT}S1 x{END_THINK}{ANSWER}7{END_ANSWER}",
        f"{THINK_TEXT} \n{END_THINK}{ANSWER}7{END_ANSWER}",
        f"{ANSWER}7{END_ANSWER}",
        f"{THINK_TEXT}S1 x and on",
        "7",
    ]
    parts = [split(text, text_splitter()) for text in texts]
    counts = metrics.block_states(
        [len(p.think.strip()) for p in parts], [p.truncated for p in parts], [p.blocks > 0 for p in parts]
    )
    assert counts == {"valid": 1, "empty": 1, "missing": 2, "truncated": 1}
    stops = [("natural", 5), ("hard", 5), ("natural", 0), ("hard", 0), ("limit", 9)]
    traces = metrics.block_states([used for _, used in stops], [stop != "natural" for stop, _ in stops])
    assert traces == {"valid": 1, "empty": 1, "missing": 0, "truncated": 3}


def test_25_a_confidence_that_collapses_to_one_is_seen_and_pays() -> None:
    """Accuracy .9 and "always sure": the reward of being right does not mind, a proper score and sharpness do."""
    g = seeds.numpy_generator("collapse")
    chance = np.clip(g.beta(6, 1, 4000), 0.02, 0.98)
    right = g.random(4000) < chance
    collapsed = np.full(4000, 0.999)
    for score in (metrics.brier, metrics.log_loss):
        assert score(chance, right) < score(np.full(4000, right.mean()), right) < score(collapsed, right)
        for shift in (-0.05, 0.01):  # proper: the truth beats what is near it
            assert score(chance, right) < score(np.clip(chance + shift, 0, 1), right)
    watched, healthy = metrics.sharpness(collapsed), metrics.sharpness(chance)
    assert (watched["sd"], watched["saturated"]) == (pytest.approx(0, abs=1e-12), 1.0)
    assert healthy["sd"] > 0.05 and healthy["saturated"] == 0.0
    assert metrics.auroc(collapsed, right) == 0.5 < metrics.auroc(chance, right)
    assert math.isnan(metrics.sharpness([])["sd"])


def test_26_the_domain_stays_with_the_calibration() -> None:
    """A threshold is worth something where it was fitted: the card says where that was and which states are foreign."""
    card = Card.load(shipped("nano"))
    assert card.domain is not None and card.fitted.dataset and card.fitted.n > 0 and card.fitted_plans
    centre = np.asarray(card.domain.centres[0])
    near, far = card.domain.distance(np.stack([centre, centre + 40.0]))
    assert near <= card.domain.threshold < far
    with pytest.raises(ValidationError, match="fitted"):
        Card(**{key: value for key, value in card.model_dump().items() if key != "fitted"})


def test_27_signed_errors_hide_what_absolute_ones_and_violations_show() -> None:
    need = np.array([10.0] * 40)
    guess = need + np.tile([-9.0, 9.0, -2.0, 2.0], 10)
    assert np.mean(guess - need) == 0.0
    errors = metrics.budget_errors(guess, need)
    assert errors["median_abs_error"] >= 2.0 and errors["p95_abs_error"] >= 9.0
    assert metrics.violation_rate(need, guess) == 0.5
    records = [
        replace(RECORD, prompt_id=str(n), needed=10, needed_correct=True, needed_closed=True, budget_predicted=float(g),
                budget_effective=3, used=4 if n < 4 else 3)
        for n, g in enumerate(guess)
    ]  # fmt: skip
    summary = summarise(records, draws=5)
    assert summary["budget_median_abs_error"] == errors["median_abs_error"]
    assert (summary["budget_p95_abs_error"], summary["violation_rate"]) == (errors["p95_abs_error"], 0.1)


def test_every_row_of_the_table_has_a_test() -> None:
    rows = {name[5:7] for name in globals() if name.startswith("test_") and name[5:7].isdigit()}
    assert rows == {f"{n:02}" for n in range(1, 28)}
