"""What the studies count, on hand-made thoughts and on a few problems of nano; their numbers are measured elsewhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnomon.attempts import Job, run
from gnomon.decoding.slack import FixedCut, Margin, SoftView, Sure, factory
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import problems

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "study_base",
    "study_thoughts",
    "study_slack",
    "study_heads",
    "study_savings",
    "study_domain",
    "study_running",
    "study_others",
)


@pytest.fixture(scope="module")
def studies() -> Iterator[dict[str, Any]]:
    """The study modules by name, with benchmarks/ importable for as long as this file runs."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in (*NAMES, "study_others", "study_smol", "studies")}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def nano() -> Reasoner:
    return Reasoner.load("nano")


@pytest.fixture(scope="module")
def thoughts(studies: dict[str, Any], nano: Reasoner) -> list[Any]:
    """Eight thoughts under verify, with answers in front of every node and behind eight tokens."""
    items = problems("multiply,boolean,sort,lookup", "val", "test-studies", 8, (1, 2))
    found = studies["study_thoughts"].collect(nano, items, "verify", states=True)
    return studies["study_thoughts"].with_trials(nano, found, lambda t: [*t.nodes, 8])  # type: ignore[no-any-return]


def made(studies: dict[str, Any], task: str, right: dict[int, bool], margins: dict[int, float], used: int) -> Any:
    """A thought of `used` tokens with boundaries where `margins` names them; its own answer is right."""
    t = studies["study_thoughts"]
    views = tuple(SoftView(u, None, u in margins, margins.get(u, 9.0), 1) for u in range(used)) + (
        SoftView(used, None, True, 0.0, 1),
    )
    trials = {p: t.Trial(ok, -0.1 if ok else -3.0, 2) for p, ok in right.items()}
    problem = Problem(task=task, level=1, prompt=f"{task} {used} {sorted(right)}", answer="1")
    return t.Thought(problem, "steps", tuple(range(used)), t.Trial(True, 0.0, 2), views, trials=trials)


def test_a_trial_answer_is_what_the_engine_gives_when_it_closes_there(
    studies: dict[str, Any], nano: Reasoner, thoughts: list[Any]
) -> None:
    bare = replace(nano, decider=None, rules=factory(FixedCut(8)))
    jobs = [Job(t.problem, "verify", None, use_prediction=False) for t in thoughts]
    closed = [group[0] for group in run(bare, jobs)]
    o = studies["study_thoughts"].outcomes(
        thoughts, [studies["study_thoughts"].where(FixedCut(8), t.views) for t in thoughts]
    )
    assert o.used.tolist() == [a.trace.used for a in closed]
    assert o.correct.tolist() == [a.correct for a in closed]


def test_views_are_those_that_the_engine_shows_to_rules(
    studies: dict[str, Any], nano: Reasoner, thoughts: list[Any]
) -> None:
    """A margin rule closes the same thoughts at the same places in the engine and in replay."""
    at = sorted(v.margin for t in thoughts for v in t.views if v.boundary and v.used < t.used)[len(thoughts)]
    replayed = [studies["study_thoughts"].where(Margin(at), t.views) for t in thoughts]
    bare = replace(nano, decider=None, rules=factory(Margin(at)))
    jobs = [Job(t.problem, "verify", None, use_prediction=False) for t in thoughts]
    for t, p, group in zip(thoughts, replayed, run(bare, jobs), strict=True):
        used = group[0].trace.used
        assert used == (t.used if p is None else p) or (used in t.nodes and t.kinds[used] == "A")


def test_the_answer_node_is_no_boundary_because_the_model_is_closing_there(thoughts: list[Any]) -> None:
    for t in thoughts:
        begun = [p for p, kind in enumerate(t.kinds) if kind == "A"]
        assert begun == [p for p in range(t.used) if t.closing[p] == 0] != []
        assert not set(begun) & set(t.boundaries) and set(begun) <= set(t.nodes)
        assert all(t.unchecked[p] <= t.closing[p] for p in range(t.used))


def test_closing_where_the_layer_is_sure_is_what_the_rule_does(
    studies: dict[str, Any], nano: Reasoner, thoughts: list[Any]
) -> None:
    """The study's policy, the rule in replay and the rule in the engine close the same thoughts at the same places."""
    r, t = studies["study_running"], studies["study_thoughts"]
    with_all = t.with_trials(nano, thoughts, lambda x: [u for u, _ in x.states])
    assert nano.decider is not None and nano.decider.card is not None and nano.decider.card.running is not None
    heads = MetacogHeads(nano.decider.heads.config.model_copy(update={"closing": True})).eval()
    heads.load_state_dict(nano.decider.heads.state_dict())
    running = nano.decider.card.running.model_copy(update={"closing_plans": ("verify",)})
    card = nano.decider.card.model_copy(update={"running": running})
    layer = r.Layer(heads, (running.temperature, running.shift), (running.whole_temperature, running.whole_shift))
    seen, promises = layer.read(with_all)
    said = sorted(x - p for s, p in zip(seen, promises, strict=True) for _, x in s)
    gap = -(said[-4] + said[-3]) / 2  # between two readings: their last bits may differ
    closed = layer.sure((gap, 0.0), with_all)
    assert 0 < sum(stop is not None for stop in closed) < len(closed)
    assert closed == [
        t.where(Sure(gap), r.with_confidence(x, s, p)) for x, s, p in zip(with_all, seen, promises, strict=True)
    ]
    jobs = [Job(x.problem, "verify", None, use_prediction=False) for x in with_all]
    found = run(replace(nano, decider=Decider(heads, card), rules=factory(Sure(gap))), jobs)
    known = [g[0] for g in found if g[0].trace.running and g[0].trace.running[0][2] is not None]
    assert len(known) > 4, "some prompts may be foreign to the card"
    for x, stop, group in zip(with_all, closed, found, strict=True):
        trace = group[0].trace
        if trace.running and trace.running[0][2] is not None:
            assert trace.used == (x.used if stop is None else stop)
            assert group[0].correct == x.at(stop).correct
    now = r.right_here(with_all)
    assert now.tolist() == [x.at(u).correct for x in with_all for u, _ in x.states if u < x.used]
    found_rises = r.rises(heads, with_all)
    assert set(found_rises["here"]) == {"first", "25%", "50%", "75%", "100%"}


def test_the_whole_comparison_runs_on_a_few_thoughts(
    studies: dict[str, Any], nano: Reasoner, thoughts: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    r = studies["study_running"]
    places = lambda t: [*t.boundaries, *(u for u, _ in t.states), *r.CUTS]  # noqa: E731
    these = studies["study_thoughts"].with_trials(nano, thoughts, places)
    assert nano.decider is not None
    groups = {
        name: [r.Layer(nano.decider.heads, (1.5, 0.3), (1.0, 0.0))] for name in ("right in the end", "right here")
    }
    found = r.study(groups, these, these)
    rules = [row["rule"] for row in found["stopping"]]
    assert {"uncapped", "answer probability", "sure, gap to the promise, seed 0"} <= set(rules)
    assert found["boundaries"] == len(r.right_here(these)) and set(found["against"]) == {
        "answer probability", "answer probability, chosen net of probes", "cut per (family, level)",
        "threshold, right here",
    }  # fmt: skip
    r._show({"stream": "x", "val_n": 8, "plans": {"verify": found}}, "verify")
    assert "Closing early, plan verify" in capsys.readouterr().out


def test_the_learned_rule_is_compared_with_what_the_others_cost(studies: dict[str, Any]) -> None:
    """Equal stops: no difference in tokens, but the other rule has paid for its probes, not for its answer."""
    r, t = studies["study_running"], studies["study_thoughts"]
    good = [made(studies, "a", dict.fromkeys((2, 4, 16, 32, 64, 128), True), {2: 3.0, 4: 1.0}, 10) for _ in range(8)]
    rules = r.Stopping(good, good)
    rules.scalars()
    stops = rules.stops["answer probability"]
    found = rules.against(stops, "answer probability")
    assert stops == [2] * 8 and found["saved"][0] == found["saved_net"][0] == 0, "its one probe is the answer"
    assert found["accuracy"][0] == 0
    slow = [replace(x, trials={**x.trials, 2: t.Trial(False, -3.0, 2)}) for x in good]
    rules = r.Stopping(slow, slow)
    rules.scalars()
    assert rules.stops["answer probability"] == [4] * 8
    found = rules.against([4] * 8, "answer probability")
    assert found["saved"][0] == 0 and found["saved_net"][0] == pytest.approx(3 / 10), "the probe at 2: answer and tag"
    later = rules.against([4] * 8, "cut per (family, level)")
    assert later["saved"] == later["saved_net"], "a rule that probes nothing"


def test_a_rival_that_spends_more_than_it_saves_is_switched_off(studies: dict[str, Any]) -> None:
    """One probe of 21 tokens in front of a close that saves 6: chosen net of probes, the rule is off and costs 0."""
    r, t = studies["study_running"], studies["study_thoughts"]
    one = made(studies, "a", dict.fromkeys((2, 4, 16, 32, 64, 128), True), {2: 3.0, 4: 1.0}, 10)
    dear = [replace(one, trials={**one.trials, 2: t.Trial(False, -3.0, 20)}) for _ in range(8)]
    rules = r.Stopping(dear, dear)
    rules.scalars()
    told = {row["rule"]: row for row in rules.rows}
    assert told["answer probability"]["probe_tokens"] == 21 and told["answer probability"]["net_tokens"] == 6 - 21
    off = told["answer probability, chosen net of probes"]
    assert (off["setting"], off["net_tokens"], off["probe_tokens"]) == (None, 0, 0)
    found = rules.against([4] * 8, "answer probability, chosen net of probes")
    assert found["saved_net"][0] == found["saved"][0] == pytest.approx(0.6), "never more than what is saved"


def test_the_setting_saves_most_within_the_tolerance(studies: dict[str, Any]) -> None:
    s, t = studies["study_slack"], studies["study_thoughts"]
    good = [made(studies, "a", {2: True, 4: True}, {2: 3.0, 4: 1.0}, 10) for _ in range(9)]
    bad = made(studies, "b", {2: False, 4: True}, {2: 3.0, 4: 1.0}, 10)
    policy = s.each(Margin, lambda x: x.views)
    assert s.chosen(policy, (0.5, 1.0, 3.0), good) == 3.0  # all right at 2
    assert s.chosen(policy, (0.5, 1.0, 3.0), [*good, bad]) == 1.0  # one of ten wrong at 2: too much
    assert s.chosen(policy, (0.5,), good) is None
    o = t.outcomes([*good, bad], policy(3.0, [*good, bad]))
    found = s.row("margin", 3.0, o, [*good, bad])
    assert (found["saved"], found["fired"]) == (pytest.approx(0.8), 1.0) and found["loss"] == pytest.approx(0.1)
    assert not found["goal"]
    assert s.earliest([good[0], bad]) == [2, 4]
    assert s.probes([bad], [4]) == 2 + 1, "the probe at 4 is the answer itself"
    assert s.probes([bad], [None]) == 2 * (2 + 1)


def test_the_table_of_cuts_is_not_chosen_in_sample(studies: dict[str, Any]) -> None:
    """On the thoughts that it is made from, each half is served by the other's."""
    t = studies["study_thoughts"]
    cuts = dict.fromkeys(t.CUTS, True)
    short = [made(studies, "a", cuts if i % 2 else dict.fromkeys(cuts, False), {}, 200) for i in range(20)]
    own = t.by_table(short, short, 1e-3)
    assert own[0] == t.by_table(short[1::2], short[:1], 1e-3)[0] == 0
    assert own[1] == t.by_table(short[::2], short[1:2], 1e-3)[0] is None


def test_hindsight_takes_the_cheapest_strategy_that_is_right(studies: dict[str, Any]) -> None:
    s = studies["study_savings"]
    correct = np.array([[False, True, True], [False, False, False], [True, True, False]])
    used = np.array([[0, 9, 4], [0, 9, 4], [0, 9, 4]])
    right, tokens = s.hindsight(correct, used)
    assert right.tolist() == [True, False, True] and tokens.tolist() == [4, 0, 0]
    fixed = correct[:, 1], used[:, 1]
    found = s.against(correct[:, 2], used[:, 2], fixed, (right, tokens))
    assert found["token_share"] == pytest.approx(12 / 27) and found["oracle_share"] == pytest.approx(15 / 23)
    assert found["loss"] == pytest.approx(1 / 3)


def test_shares_are_of_the_plans_that_were_chosen(studies: dict[str, Any]) -> None:
    d = studies["study_domain"]
    flagged = np.array([[True, False], [False, True], [True, True], [False, False]])
    found = d.shares(flagged, np.array([0, 0, 1, 1]), np.array([False, False, True, True]), ["a", "a", "b", "c"])
    assert (found["in_domain"], found["left_out"], found["least"]) == (0.5, 0.5, 0.0)
    assert found["families"] == {"b": 1.0, "c": 0.0} and found["in_domain_all_plans"] == 0.5
    groups = d.splits(list("abcdefghijklm"))
    assert [len(g) for g in groups] == [3, 3, 3] and len({f for g in groups for f in g}) == 9


def test_the_look_up_stands_in_for_heads(studies: dict[str, Any]) -> None:
    """With one family easy and one hard the table's numbers are those of their means."""
    h = studies["study_heads"]
    n = 40
    family = tuple("ab"[i % 2] for i in range(n))
    correct = np.array([[f == "a", True] for f in family])
    read = {
        "plans": ("direct", "steps"), "family": family, "level": (1,) * n, "correct": correct,
        "used": np.tile([0, 10], (n, 1)), "closed": np.ones((n, 2), dtype=bool),
    }  # fmt: skip
    label = np.where(correct[:, 0], 0, 1)
    told = h.from_table(read, read, label)
    found = h.measure(told, label, 0.01, np.arange(n))
    assert found["plan_accuracy"] == 1.0 and found["accuracy"] == 1.0 and found["tokens"] == 5.0
    assert found["value"] == pytest.approx(1.0 - 0.01 * 5.0)
    assert np.isnan(found["before_steps"])  # nothing is wrong under steps


@pytest.mark.parametrize(
    ("count", "share", "index"), [(1, 0.25, 0), (4, 0.25, 0), (4, 0.5, 1), (5, 0.75, 3), (7, 1.0, 6)]
)
def test_the_place_of_a_share(studies: dict[str, Any], count: int, share: float, index: int) -> None:
    assert studies["study_running"].place(count, share) == index


def test_intervals_over_seeds(studies: dict[str, Any]) -> None:
    found = studies["study_base"].over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * np.std([1, 2, 3, 4, 5], ddof=1) / np.sqrt(5)
    assert found["ci"] == pytest.approx([3 - half, 3 + half])


def test_without_a_study_it_says_what_there_is(studies: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`make bench` runs every script of the folder."""
    studies["studies"].main([])
    assert "slackstop" in capsys.readouterr().out


def test_the_other_outputs_are_compared_in_pairs(studies: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that differ by noise alone: an interval of some width, and none where every choice is the same; heads that
    always take the worse plan lose what it loses."""
    o, rng = studies["study_others"], np.random.default_rng(3)
    monkeypatch.setattr(o, "DRAWS", 60)
    n, plans = 400, ("direct", "steps")
    right = np.stack([rng.random(n) < 0.5, rng.random(n) < 0.9], 1)

    def read(choice: float) -> dict[str, Any]:
        noise = rng.normal(size=(n, 2))
        return {
            "plans": plans, "family": ("a", "b") * (n // 2), "correct": right, "closed": np.ones((n, 2), bool),
            "used": np.tile([0, 20], (n, 1)) + rng.integers(0, 4, (n, 2)), "conf_before": right + noise,
            "conf_after": right + noise, "plan_probs": np.tile([0.5, 0.5], (n, 1)), "budget_raw": 3.0 + 0.1 * noise,
            "solve": np.stack([np.zeros(n), np.full(n, choice)], 1), "cost": np.tile([0.0, 3.0], (n, 1)),
        }  # fmt: skip

    label = np.where(right[:, 0], 0, np.where(right[:, 1], 1, -1))
    same = o.compared({"old": [read(9.0), read(9.0)], "new": [read(9.0), read(9.0)]}, label, 1e-3)
    assert same["accuracy"]["over_problems"] == [0.0, 0.0], "the same choice on every problem"
    low, high = same["before_steps"]["over_problems"]
    assert low < same["before_steps"]["difference"]["mean"] < high < low + 0.2, "around what was measured"
    worse = o.compared({"old": [read(9.0)], "new": [read(-9.0)]}, label, 1e-3)["accuracy"]
    assert worse["difference"]["mean"] == pytest.approx(right[:, 0].mean() - right[:, 1].mean())
    assert worse["over_problems"][0] < worse["difference"]["mean"] < worse["over_problems"][1] < 0
    o.show_others(same, n)
