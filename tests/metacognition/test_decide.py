"""The card (round trip, tampering) and the decider (plan in cost order, clip, temperature once, unknown outside)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gnomon.base.errors import CheckpointError, ModelError, UnknownNameError
from gnomon.base.seeds import seed_torch, torch_generator
from gnomon.metacognition.calibration import (
    BudgetClip,
    Card,
    Domain,
    Fitted,
    Quality,
    Running,
    Temperatures,
    clip_tokens,
    first_reaching,
)
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider, combine
from gnomon.metacognition.heads import MetacogHeads, site_ids
from gnomon.metacognition.readers import TorchReader

N, L, C, P = 5, 3, 8, 4
PLANS = ("direct", "steps", "verify", "decompose")


@pytest.fixture
def heads() -> MetacogHeads:
    seed_torch("decide")
    made = MetacogHeads(MetacogConfig(n_layers=L, hidden_size=C, proj_dim=P, width=16)).eval()
    made.start_from(3.0, 0.6)
    return made


@pytest.fixture
def taps() -> torch.Tensor:
    return torch.randn(N, L, C, generator=torch_generator("decide-taps"))


UNIT = tuple(tuple(map(float, row)) for row in np.eye(C))


def make_card(heads: MetacogHeads, threshold: float = 1e6, **change: object) -> Card:
    quality = Quality(n=10, ece=0.02, brier=0.1, auroc=0.9)
    body: dict[str, object] = {
        "weights": heads.fingerprint(),
        "plans": PLANS,
        "cost_order": ("direct", "steps", "decompose", "verify"),
        "plan_threshold": 0.5,
        "temperature": Temperatures(before=2.0, after=0.5),
        "budget_clip": BudgetClip(tested_offset=0.4, level=0.8, operating_offset=0.25, n=100),
        "domain": Domain(layer=0, centres=((0.0,) * C,), precision=UNIT, threshold=threshold),
        "fitted_plans": ("direct", "steps"),
        "best_plan": {"chain": "steps"},
        "fitted": Fitted(dataset="all", stream="cal", n=10, before=quality, after=quality),
    }
    return Card(**{**body, **change})  # type: ignore[arg-type]


def test_round_trip_and_binding_to_the_weights(tmp_path: Path, heads: MetacogHeads) -> None:
    card = make_card(heads)
    card.save(tmp_path)
    assert Card.load(tmp_path, weights=heads.fingerprint()) == card
    with torch.no_grad():
        heads.conf_head[2].bias.add_(1e-3)
    with pytest.raises(CheckpointError, match="fitted on heads"):
        Card.load(tmp_path, weights=heads.fingerprint())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["temperature"].update(after=0.7), "changed after fitting"),
        (lambda b: b.update(weights="0" * 64), "changed after fitting"),
        (lambda b: b.pop("digest"), "changed after fitting"),
        (lambda b: b.update(version=99), "version 99"),
        (lambda b: b["temperature"].update(after=-1.0), "cannot be used"),
        (lambda b: b.update(surprise=1), "surprise"),
        (lambda b: b.pop("budget_clip"), "budget_clip"),
        (lambda b: b.update(domain=None), "domain"),
    ],
)
def test_a_tampered_card_is_refused(tmp_path: Path, heads: MetacogHeads, change: object, message: str) -> None:
    make_card(heads).save(tmp_path)
    path = tmp_path / "calibration.json"
    body = json.loads(path.read_text())
    change(body)  # type: ignore[operator]
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=message):
        Card.load(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gnomon calibrate"):
        Card.load(tmp_path)
    (tmp_path / "calibration.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match="cannot be used"):
        Card.load(tmp_path)
    (tmp_path / "calibration.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="cannot be used"):
        Card.load(tmp_path)


def test_inconsistent_cards_are_refused(heads: MetacogHeads) -> None:
    for change in ({"cost_order": ("direct",)}, {"fitted_plans": ("guess",)}, {"plan_threshold": 0.0}):
        with pytest.raises(ValidationError):
            make_card(heads, **change)


def test_first_in_cost_order_that_reaches_the_threshold() -> None:
    probs = np.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.3, 0.1, 0.5], [0.0, 0.1, 0.9, 0.0], [0.25, 0.25, 0.25, 0.25]])
    order = (0, 1, 3, 2)
    assert first_reaching(probs, order, 0.5).tolist() == [0, 3, 2, 1]
    assert first_reaching(probs, order, 1.0).tolist() == [2, 2, 2, 2]
    assert first_reaching(probs * 0.999, order, 1.0).tolist() == [2, 2, 2, 2], "rounding leaves no row without a plan"


def test_plan_follows_the_card_and_argmax_without_one(heads: MetacogHeads, taps: torch.Tensor) -> None:
    logits = heads(taps, site_ids("prompt", N), torch.zeros(N)).plan_logits.double()
    probs = logits.softmax(-1).detach().numpy()
    card = make_card(heads)
    got = Decider(heads, card).plan(taps)
    assert [d.plan for d in got] == [PLANS[k] for k in first_reaching(probs, (0, 1, 3, 2), 0.5)]
    assert sum(got[0].probs.values()) == pytest.approx(1.0, abs=1e-5)
    assert [d.plan for d in Decider(heads).plan(taps)] == [PLANS[k] for k in probs.argmax(1)]


def test_temperature_and_clip_are_applied_exactly_once(heads: MetacogHeads, taps: torch.Tensor) -> None:
    with torch.no_grad():
        out = heads(taps, site_ids("think", N), torch.zeros(N))
        end = heads(taps, site_ids("end", N), torch.full((N,), 20.0))
    decider = Decider(heads, make_card(heads))
    for row, d in enumerate(decider.budget(taps, ["steps"] * N)):
        assert d.calibrated
        assert d.confidence == pytest.approx(1 / (1 + math.exp(-float(out.conf_raw[row]) / 2.0)), abs=1e-6)
        assert d.predicted == pytest.approx(math.expm1(float(out.budget_raw[row])), rel=1e-5)
        assert d.clipped == math.ceil(math.expm1(float(out.budget_raw[row]) + 0.25) - 1e-6)
    for row, a in enumerate(decider.after(taps, ["steps"] * N, [20] * N)):
        assert a.confidence == pytest.approx(1 / (1 + math.exp(-float(end.conf_raw[row]) / 0.5)), abs=1e-6)


def test_unknown_outside_the_domain(heads: MetacogHeads, taps: torch.Tensor) -> None:
    states = taps[:, 0]
    radius = states.norm(dim=1).median().item() * 1.0001
    rows = Decider(heads, make_card(heads, threshold=radius)).budget(taps, ["steps"] * N)
    far = states.norm(dim=1) > radius + 1e-5
    assert 0 < int(far.sum()) < N
    for d, is_far in zip(rows, far.tolist(), strict=True):
        assert d.calibrated is not is_far
        assert (d.confidence is None) is is_far
        assert d.distance is not None
        assert d.clipped >= 0, "a budget is still proposed"


def test_a_distance_that_is_no_number_is_foreign(
    heads: MetacogHeads, taps: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [[3.0, 4.0, 0.5, 0.0, distance] for distance in (0.0, math.nan, math.inf, 0.0, math.nan)]
    decider = Decider(heads, make_card(heads))
    monkeypatch.setattr(decider.reader, "budget", lambda taps, plans: (said, None))
    rows = decider.budget(taps, ["steps"] * N)
    assert [d.confidence is not None for d in rows] == [d.calibrated for d in rows] == [True, False, False, True, False]
    assert [d.distance for d in rows] == [0.0, None, None, 0.0, None]


@pytest.mark.parametrize("native", [True, False])
def test_broken_states_are_told_and_never_a_budget(heads: MetacogHeads, taps: torch.Tensor, native: bool) -> None:
    taps[2, 1, 3] = math.nan
    plans, used = ["steps"] * N, [3] * N
    for card in (None, make_card(heads, running=RUNNING)):
        decider = Decider(heads, card)
        if not native:
            decider.reader = TorchReader(heads, card)
        reads = [lambda d: d.plan(taps), lambda d: d.budget(taps, plans), lambda d: d.after(taps, plans, used)]
        for read in (*reads, *([lambda d: d.running(taps, plans, used)] if card else [])):
            with pytest.raises(ModelError, match="the heads gave no number .* the base's states are broken"):
                read(decider)
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(ModelError, match="no number"):
            clip_tokens(np.array([1.0, broken]), 0.0)


def test_unknown_under_a_plan_or_budget_not_fitted_for(heads: MetacogHeads, taps: torch.Tensor) -> None:
    decider = Decider(heads, make_card(heads))
    assert [d.calibrated for d in decider.budget(taps[:2], ["steps", "verify"])] == [True, False]
    forced = decider.budget(taps[:2], ["steps", "steps"], predicted_plans=["steps", "direct"])
    assert [d.calibrated for d in forced] == [True, False]
    late = decider.after(taps[:3], ["steps", "steps", "verify"], [3, 3, 3], calibrated=[True, False, True])
    assert [a.confidence is None for a in late] == [False, True, True]
    card = decider.card
    assert card is not None
    assert not card.covers("steps", capped_below=True)


def test_without_a_card_nothing_is_promised(heads: MetacogHeads, taps: torch.Tensor) -> None:
    decider = Decider(heads)
    plan, budget = decider.plan(taps)[0], decider.budget(taps, ["steps"] * N)[0]
    decision = combine(plan, budget)
    assert (decision.confidence, decision.calibrated) == (None, False)
    assert decision.budget_clipped == math.ceil(decision.budget_predicted - 1e-6)
    assert decider.after(taps, ["steps"] * N, [1] * N)[0].confidence is None


def test_the_same_input_gives_the_same_prediction(heads: MetacogHeads, taps: torch.Tensor) -> None:
    heads.train()  # the decider must switch dropout off
    decider = Decider(heads, make_card(heads))
    first = decider.budget(taps, ["steps"] * N)
    assert decider.budget(taps, ["steps"] * N) == first
    assert heads.training is False


def test_names_are_checked(heads: MetacogHeads, taps: torch.Tensor) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        Decider(heads).budget(taps[:1], ["step"])
    with pytest.raises(ModelError, match="plans"):
        Decider(heads, make_card(heads, plans=PLANS[::-1]))


RUNNING = Running(offset=0.3, level=0.95, temperature=2.0, shift=0.5, n=100)


def test_running_estimates_follow_the_card(heads: MetacogHeads, taps: torch.Tensor) -> None:
    with torch.no_grad():
        heads.trunk.used_offset.add_(torch.linspace(-0.2, 0.3, 16))
    decider = Decider(heads, make_card(heads, running=RUNNING))
    assert decider.reads_boundaries
    used, plans = [3, 9, 0, 40, 2], ["steps", "direct", "verify", "steps", "no such plan"]
    out = heads(taps, site_ids("boundary", N), torch.tensor(used).float())
    got = decider.running(taps, plans, used)
    for i, row in enumerate(got):
        raw, logit = out.budget_raw[i].item(), out.conf_raw[i].item()
        assert row.remaining == pytest.approx(max(math.expm1(raw), 0.0), rel=1e-4)
        assert row.upper == pytest.approx(math.ceil(math.expm1(raw + 0.3)), abs=1) and row.upper >= row.remaining
        assert row.raw == pytest.approx(logit, abs=1e-4)
        if i in (2, 4):
            assert row.confidence is None, "a plan that the card was not fitted for, or does not know"
        else:
            assert row.confidence == pytest.approx(1 / (1 + math.exp(-(logit / 2 + 0.5))), abs=1e-5)
    later = decider.running(taps, plans, [u + 30 for u in used])
    assert any(a.raw != b.raw for a, b in zip(got, later, strict=True)), "the tokens used so far are an input"
    assert [r.confidence for r in decider.running(taps, plans, used, [False] * N)] == [None] * N
    assert isinstance(got[0].upper, int)


def test_a_card_without_running_estimates_reads_no_boundaries(heads: MetacogHeads, taps: torch.Tensor) -> None:
    for decider in (Decider(heads), Decider(heads, make_card(heads))):
        assert not decider.reads_boundaries
        with pytest.raises(ModelError, match="calibrate it again"):
            decider.running(taps, ["steps"] * N, [1] * N)


def test_cards_with_and_without_running_estimates_load(tmp_path: Path, heads: MetacogHeads) -> None:
    old, new = make_card(heads), make_card(heads, running=RUNNING)
    assert old.digest() != new.digest()
    old.save(tmp_path)
    body = json.loads((tmp_path / "calibration.json").read_text())
    assert "running" not in body, "byte for byte what older versions wrote, so their digests still hold"
    assert Card.load(tmp_path) == old
    new.save(tmp_path)
    assert Card.load(tmp_path) == new
    body = json.loads((tmp_path / "calibration.json").read_text())
    body["running"]["offset"] = 0.0
    (tmp_path / "calibration.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="changed after fitting"):
        Card.load(tmp_path)


def closing_heads(closing: bool = True) -> MetacogHeads:
    seed_torch("decide")
    return MetacogHeads(MetacogConfig(n_layers=L, hidden_size=C, proj_dim=P, width=16, closing=closing)).eval()


@pytest.mark.parametrize("native", [True, False])
def test_the_confidence_of_closing_holds_under_the_plans_it_was_fitted_on(taps: torch.Tensor, native: bool) -> None:
    """Also where a user chose the plan, which no other confidence survives."""
    made = closing_heads()
    card = make_card(made, running=RUNNING.model_copy(update={"closing_plans": ("steps", "verify")}))
    decider = Decider(made, card)
    if not native:
        decider.reader = TorchReader(made, card)
    assert decider.closes
    plans = ["steps", "verify", "direct", "decompose", "steps"]
    flags = [b.at_boundaries for b in decider.budget(taps, plans, ["direct"] * N)]
    assert flags == [True, True, False, False, True]
    assert [b.calibrated for b in decider.budget(taps, plans, ["decompose"] * N)][:2] == [False, False]
    used = [3, 4, 5, 6, 7]
    said = decider.running(taps, plans, used, flags)
    logit = made(taps, site_ids("boundary", N), torch.tensor(used).float()).conf_raw.double().detach().numpy()
    want = RUNNING.confidence(logit)
    assert [s.confidence is not None for s in said] == flags
    first = decider.budget(taps, plans, ["direct"] * N)
    assert [b.promised is not None for b in first] == flags
    assert first[0].promised == pytest.approx(float(RUNNING.promise(first[0].raw)))
    assert [s.confidence for s in said if s.confidence is not None] == pytest.approx(want[[0, 1, 4]].tolist(), abs=1e-6)
    mixed = decider.reached(taps, [False, True, False, False, False], plans, used, flags)
    assert mixed[0] == pytest.approx(said[0]) and mixed[2].confidence is None
    far = Decider(made, make_card(made, threshold=1e-6, running=card.running))
    assert not any(b.at_boundaries for b in far.budget(taps, ["steps"] * N))


def test_a_card_without_trial_answers_knows_no_confidence_of_closing(taps: torch.Tensor) -> None:
    decider = Decider(closing_heads(), make_card(closing_heads(), running=RUNNING))
    assert not decider.closes and decider.reads_boundaries
    assert [r.confidence for r in decider.running(taps, ["steps"] * N, [1] * N)] == [None] * N
    assert [r.upper for r in decider.running(taps, ["steps"] * N, [1] * N)] != [None] * N


def test_heads_from_before_have_the_fingerprint_they_had(heads: MetacogHeads) -> None:
    old = closing_heads(False)
    old.load_state_dict(heads.state_dict())
    assert old.fingerprint() == heads.fingerprint()
    new = closing_heads()
    new.load_state_dict(heads.state_dict())
    assert new.fingerprint() != heads.fingerprint(), "the same numbers mean something else"


def test_plans_of_closing_are_kept_and_checked(tmp_path: Path, heads: MetacogHeads) -> None:
    card = make_card(heads, running=RUNNING.model_copy(update={"closing_plans": ("steps",)}))
    card.save(tmp_path / "c.json")
    assert Card.load(tmp_path / "c.json") == card
    make_card(heads, running=RUNNING).save(tmp_path / "old.json")
    assert "closing_plans" not in (tmp_path / "old.json").read_text(), "as older versions wrote it"
    with pytest.raises(ValidationError, match="not among"):
        make_card(heads, running=RUNNING.model_copy(update={"closing_plans": ("guess",)}))
