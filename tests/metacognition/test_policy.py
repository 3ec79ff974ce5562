"""The decoding policy: labels, identity until trained, what the decider says, what old layers keep."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gnomon.base.errors import DataError, ModelError, UnknownNameError
from gnomon.base.seeds import numpy_generator, seed_torch, torch_generator
from gnomon.metacognition import policy, store
from gnomon.metacognition.config import BOUNDARY, END, PROMPT, THINK_SITE, MetacogConfig
from gnomon.metacognition.decide import Decider, combine
from gnomon.metacognition.heads import MetacogHeads, site_ids, telemetry
from gnomon.metacognition.policy import GRID, IDENTITY, Sampling
from gnomon.metacognition.readers import TorchReader
from gnomon.protocol.trace import Request

N, L, C = 40, 3, 8
NANO = Path(store.__file__).parents[1] / "assets" / "nano"


def heads_of(entries: int = len(GRID), **change: object) -> MetacogHeads:
    seed_torch("policy-heads")
    config = MetacogConfig(n_layers=L, hidden_size=C, proj_dim=4, width=16, policy=entries, **change)
    return MetacogHeads(config).eval()


def states() -> torch.Tensor:
    return torch.randn(N, L, C, generator=torch_generator("policy-taps"))


def trained(entries: int = len(GRID)) -> MetacogHeads:
    """Heads whose policies differ from row to row: around its mean no entry is preferred."""
    heads = heads_of(entries)
    assert heads.policy_head is not None
    last = heads.policy_head[-1]
    with torch.no_grad():
        last.weight.copy_(torch.randn(last.weight.shape, generator=torch_generator("policy-kick", entries)))
        last.bias.zero_()
        last.bias.sub_(heads(states(), site_ids("think", N), torch.zeros(N)).policy_logits.mean(0))
    return heads


@pytest.fixture
def taps() -> torch.Tensor:
    return states()


def test_every_entry_of_the_grid_can_be_asked_for() -> None:
    assert GRID[IDENTITY] is None and None not in GRID[1:]
    assert len(set(GRID)) == len(GRID)
    for entry in GRID[1:]:
        assert entry is not None
        request = Request("r", (1,), temperature=entry.temperature, top_p=entry.top_p)
        assert (request.temperature, request.top_p) == (entry.temperature, entry.top_p)


def test_settings_change_the_thought_alone() -> None:
    entry = Sampling(0.6, 0.95)
    assert policy.settings(entry, 0.0, 1.0, thinking=True) == (0.6, 0.95)
    assert policy.settings(entry, 0.0, 1.0, thinking=False) == (0.0, 1.0)
    for thinking in (True, False):
        assert policy.settings(None, 0.7, 0.9, thinking=thinking) == (0.7, 0.9)


def test_labels_against_loops() -> None:
    rates = numpy_generator("rates").integers(0, 3, size=(300, 4)) / 2.0
    rates[5, 2] = math.nan
    want = []
    for row in rates.tolist():
        best = 0
        for k, rate in enumerate(row):
            if rate > row[best]:
                best = k
        want.append(-1 if any(map(math.isnan, row)) or row[best] == 0.0 else best)
    found = policy.policy_labels(rates)
    assert found.dtype == np.int64 and found.tolist() == want
    assert set(want) == {-1, 0, 1, 2, 3}
    by_hand = [[0.5, 0.5], [0.0, 0.0], [0.2, 0.9], [0.0, 0.1], [math.nan, 1.0]]
    assert policy.policy_labels(by_hand).tolist() == [0, -1, 1, 1, -1], "ties go to identity"
    assert policy.policy_labels(np.zeros((0, 3))).tolist() == []


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([0.5, 0.5], r"got \[2\]"),
        ([[0.5]], r"2 to 5 entries of the grid, got \[1, 1\]"),
        ([[0.1] * 6], r"got \[1, 6\]"),
        ([[0.1, 0.2], [0.1, 1.5]], r"row 1 holds \[0.1, 1.5\]"),
        ([[-0.1, 0.2]], "shares from 0 to 1"),
    ],
)
def test_rates_that_are_none_are_refused(rates: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        policy.policy_labels(rates)  # type: ignore[arg-type]


@pytest.mark.parametrize("entries", [-1, 1, len(GRID) + 1])
def test_a_head_over_another_grid_is_refused(entries: int) -> None:
    with pytest.raises(ValidationError, match=f"policy must be 0 .* got {entries}"):
        heads_of(entries)


def test_untrained_heads_say_identity_at_every_site(taps: torch.Tensor) -> None:
    heads = heads_of()
    for site in (PROMPT, THINK_SITE, END, BOUNDARY):
        out = heads(100.0 * taps, torch.full((N,), site), torch.full((N,), 7.0))
        assert out.policy_logits.shape == (N, len(GRID))
        assert torch.equal(out.policy_logits, out.policy_logits[:1].expand(N, -1)), "no state moves it"
        assert (out.policy_logits.argmax(-1) == IDENTITY).all()
    assert telemetry(out)["policy/identity"] == 1.0
    decider = Decider(heads)
    assert decider.modulates and decider.policy(taps, ["steps"] * N) == [None] * N


def test_the_decider_says_the_likeliest_entry(taps: torch.Tensor) -> None:
    heads = trained()
    logits = heads(taps, site_ids("think", N), torch.zeros(N)).policy_logits.detach()
    want = [GRID[int(k)] for k in logits.argmax(-1)]
    assert len(set(want)) >= 3
    decider = Decider(heads)
    assert decider.policy(taps, ["steps"] * N) == want
    assert decider.policy(taps[:0], []) == []
    rows = TorchReader(heads, None).policy(taps)
    assert np.allclose(np.array(rows)[:, 1:], logits.double().softmax(-1).numpy(), atol=1e-6)
    shares = telemetry(heads(taps, site_ids("think", N), torch.zeros(N)))
    assert shares["policy/identity"] == pytest.approx(np.mean([w is None for w in want]))
    assert set(Decider(trained(2)).policy(taps, ["steps"] * N)) == {None, GRID[1]}


def test_a_decision_carries_its_policy(taps: torch.Tensor) -> None:
    decider = Decider(trained())
    plan, budget = decider.plan(taps)[0], decider.budget(taps, ["steps"] * N)[0]
    assert combine(plan, budget).sampling is None
    told = asdict(combine(plan, budget, Sampling(0.3, 1.0)))
    assert told["sampling"] == {"temperature": 0.3, "top_p": 1.0}


def test_heads_without_a_policy_leave_the_sampler_alone(taps: torch.Tensor) -> None:
    heads = heads_of(0)
    out = heads(taps, site_ids("think", N), torch.zeros(N))
    assert out.policy_logits is None and "policy/identity" not in telemetry(out)
    decider = Decider(heads)
    assert not decider.modulates and decider.policy(taps, ["steps"] * N) == [None] * N


def test_a_policy_changes_no_other_reading(taps: torch.Tensor) -> None:
    plain, more = heads_of(0), trained()
    used = torch.zeros(N)
    a, b = (h(taps, site_ids("think", N), used) for h in (plain, more))
    assert torch.equal(a.budget_raw, b.budget_raw) and torch.equal(a.plan_logits, b.plan_logits)
    assert Decider(plain).budget(taps, ["steps"] * N) == Decider(more).budget(taps, ["steps"] * N)


def test_bad_states_and_names_are_told(taps: torch.Tensor) -> None:
    decider = Decider(trained())
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        decider.policy(taps[:1], ["step"])
    taps[3, 0, 0] = math.nan
    with pytest.raises(ModelError, match="the heads gave no number"):
        decider.policy(taps, ["steps"] * N)


def test_a_policy_is_kept_on_disk_and_in_the_fingerprint(tmp_path: Path, taps: torch.Tensor) -> None:
    heads = trained(3)
    store.save(tmp_path, heads, None, "base")
    found = store.load(tmp_path, "base")
    assert found is not None
    assert found[0].fingerprint() == heads.fingerprint() != heads_of(3).fingerprint()
    assert Decider(found[0]).policy(taps, ["steps"] * N) == Decider(heads).policy(taps, ["steps"] * N)


def test_layers_older_than_the_policy_keep_their_fingerprint() -> None:
    heads = heads_of(0, values=True)
    fields = heads.config.model_dump(mode="json")
    assert fields.pop("policy") == 0 and fields.pop("closing") is False
    digest = hashlib.sha256(MetacogConfig(**fields).model_dump_json(exclude={"policy", "closing"}).encode())
    for name, tensor in sorted(heads.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    assert heads.fingerprint() == digest.hexdigest()


def test_the_shipped_layer_still_belongs_to_its_card() -> None:
    found = store.load(NANO)  # refuses a card that was fitted on other heads
    assert found is not None
    heads, card = found[:2]
    assert card is not None and card.weights == heads.fingerprint()
    assert heads.config.policy == 0 and not Decider(heads, card).modulates
