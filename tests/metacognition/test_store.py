"""A layer on disk: round trips with and without a steerer, what is refused by name, what a card is bound to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import own
from tests.decoding.steered import heads_for
from tests.decoding.tiny import Tiny
from tests.metacognition.test_decide import make_card
from tests.training.test_thoughts import random_steerer
from torch import Tensor

from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import CheckpointError, ModelError
from gnomon.base.seeds import torch_generator
from gnomon.data.codec import OwnCodec
from gnomon.data.codec import fingerprint as codec_fingerprint
from gnomon.metacognition import store
from gnomon.metacognition.calibration import FILE_NAME as CARD_FILE
from gnomon.metacognition.calibration import Card
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import Steerer
from gnomon.model.overlay import Overlay
from gnomon.reasoner import Reasoner, shipped

BASE = "b" * 64
PLANS = ["steps", "direct", "steps"]


def parts(**options: Any) -> tuple[MetacogHeads, Steerer]:
    heads = heads_for(Tiny())
    return heads, random_steerer(heads, **options)


def card_for(heads: MetacogHeads, steerer: Steerer | None) -> Card:
    zeros = tuple((0.0,) * 16 for _ in range(16))
    unit = tuple(tuple(float(i == j) for j in range(16)) for i in range(16))
    return make_card(
        heads,
        weights=store.fingerprint(heads, steerer),
        plans=("direct", "steps"),
        cost_order=("direct", "steps"),
        domain={"layer": 0, "centres": (zeros[0],), "precision": unit, "threshold": 100.0},
    )


def decisions(layer: store.Layer) -> list[Any]:
    """Everything that a layer says about some states, as plain numbers."""
    taps = torch.randn(3, 2, 16, generator=torch_generator("store-taps"))
    decider = Decider(*layer[:3])
    said = decider.budget(taps, PLANS)
    gates = [None if d.gate is None else d.gate.tolist() for d in said]
    rest = [d._replace(gate=None) for d in said]
    return [decider.plan(taps), rest, gates, decider.after(taps, PLANS, [4, 5, 6])]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "options", [None, {}, {"gate_layer": None, "rank": 2}, {"adapter_layers": (), "gate_layer": 0}]
)
@pytest.mark.parametrize("carded", [True, False])
def test_what_was_saved_is_what_is_loaded(tmp_path: Path, options: dict[str, Any] | None, carded: bool) -> None:
    heads, steerer = parts(**(options or {}))
    made = store.Layer(heads, None, None if options is None else steerer)
    made = made._replace(card=card_for(heads, made.steerer) if carded else None)
    store.save(tmp_path, heads, made.card, BASE, made.steerer)
    found = store.load(tmp_path, BASE)
    assert found is not None and found.card == made.card and (found.steerer is None) == (options is None)
    assert decisions(found) == decisions(made)
    assert store.fingerprint(found.heads, found.steerer) == store.fingerprint(heads, made.steerer)
    if found.steerer is not None:
        assert found.steerer.config == steerer.config
        want = steerer.state_dict()
        assert all(torch.equal(v, want[k]) for k, v in found.steerer.state_dict().items())
        a, b = found.steerer.steering(), steerer.steering()
        assert a.gate_layer == b.gate_layer and a.layers == b.layers
        assert all(torch.equal(x, y) for k in a.adapters for x, y in zip(a.adapters[k], b.adapters[k], strict=True))


def test_a_folder_without_a_layer_and_a_layer_without_a_steerer(tmp_path: Path) -> None:
    assert store.load(tmp_path, BASE) is None
    heads, _ = parts()
    store.save(tmp_path, heads, card_for(heads, None), BASE)
    body = json.loads((tmp_path / store.CONFIG_FILE).read_text())
    assert "steerer" not in body, "byte for byte what older versions wrote"
    assert not any(name.startswith("steerer") for name in load_tensors(tmp_path, store.WEIGHTS_FILE))
    found = store.load(tmp_path, BASE)
    assert found is not None and found.steerer is None and found.card is not None
    assert store.fingerprint(heads, None) == heads.fingerprint(), "their cards still hold"
    assert Decider(*found[:3]).steering is None


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    heads, steerer = parts()
    store.save(tmp_path, heads, None, BASE, steerer)
    with pytest.raises(ModelError, match="was trained on base bbbbbbbbbbbb, but this base is cccccccccccc"):
        store.load(tmp_path, "c" * 64)
    assert store.load(tmp_path) is not None, "without a base at hand nothing is compared"


def rename(state: dict[str, Tensor]) -> None:
    state["steerer.adapters.stray"] = state["steerer.adapters.bias"].clone()


def widen(state: dict[str, Tensor]) -> None:
    state["steerer.adapters.up"] = torch.zeros(2, 16, 9)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.pop("steerer.gate.out.bias"), "steerer.gate.out.bias"),
        (lambda s: s.pop("trunk.inp.weight"), "trunk.inp.weight"),
        (rename, "steerer.adapters.stray"),
        (widen, "steerer.adapters.up"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str
) -> None:
    heads, steerer = parts()
    store.save(tmp_path, heads, None, BASE, steerer)
    state = load_tensors(tmp_path, store.WEIGHTS_FILE)
    change(state)
    save_tensors(tmp_path, store.WEIGHTS_FILE, state)
    with pytest.raises(CheckpointError, match=rf"does not fit its config.*: {name}$"):
        store.load(tmp_path, BASE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b.pop("steerer"), CheckpointError, "does not fit its config.*: steerer.adapters.bias"),
        (lambda b: b["steerer"].update(rank=9), CheckpointError, "steerer.adapters.down, steerer.adapters.up$"),
        (lambda b: b["steerer"].update(rank="wide"), CheckpointError, "cannot be read: .*rank"),
        (lambda b: b["steerer"].update(extra=1), CheckpointError, "cannot be read: .*extra"),
        (lambda b: b.update(steerer=None), CheckpointError, "cannot be read"),
        (lambda b: b["steerer"].update(gate_layer=7), ModelError, "gate_layer names 7, but the blocks .* 0 to 1"),
    ],
)
def test_a_config_that_was_changed_is_told(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    heads, steerer = parts()
    store.save(tmp_path, heads, None, BASE, steerer)
    body = json.loads((tmp_path / store.CONFIG_FILE).read_text())
    change(body)
    (tmp_path / store.CONFIG_FILE).write_text(json.dumps(body))
    with pytest.raises(error, match=f"(?s){message}"):
        store.load(tmp_path, BASE)


@pytest.mark.parametrize("name", ["adapters.up", "adapters.bias", "gate.out.weight"])
def test_a_card_belongs_to_the_whole_layer(tmp_path: Path, name: str) -> None:
    heads, steerer = parts()
    store.save(tmp_path, heads, card_for(heads, steerer), BASE, steerer)
    assert store.load(tmp_path, BASE) is not None
    state = load_tensors(tmp_path, store.WEIGHTS_FILE)
    state[f"steerer.{name}"].view(-1)[0] += 1e-3
    save_tensors(tmp_path, store.WEIGHTS_FILE, state)
    with pytest.raises(CheckpointError, match=r"was fitted on heads .* run `gnomon calibrate`"):
        store.load(tmp_path, BASE)
    # Nor does a card move between a layer with a steerer and the same heads without one.
    for card, acts in ((card_for(heads, None), steerer), (card_for(heads, steerer), None)):
        store.save(tmp_path, heads, card, BASE, acts)
        with pytest.raises(CheckpointError, match="was fitted on heads"):
            store.load(tmp_path, BASE)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["heads", "steerer"])
def test_broken_weights_are_refused_and_nothing_is_overwritten(tmp_path: Path, where: str, broken: float) -> None:
    heads, steerer = parts()
    store.save(tmp_path, heads, card_for(heads, steerer), BASE, steerer)
    before = files(tmp_path)
    assert set(before) == {store.CONFIG_FILE, store.WEIGHTS_FILE, CARD_FILE}
    other, acts = parts(rank=3)
    with torch.no_grad():
        next(iter((other if where == "heads" else acts).parameters())).view(-1)[0] = broken
    with pytest.raises(CheckpointError, match="refusing to save .*NaN or infinite values in 1 of"):
        store.save(tmp_path, other, card_for(other, acts), "d" * 64, acts)
    assert files(tmp_path) == before and store.load(tmp_path, BASE) is not None


def test_a_layer_without_a_card_leaves_no_card_of_another_behind(tmp_path: Path) -> None:
    heads, steerer = parts()
    store.save(tmp_path, heads, card_for(heads, None), BASE)
    store.save(tmp_path, heads, None, BASE, steerer)
    found = store.load(tmp_path, BASE)
    assert found is not None and found.card is None and found.steerer is not None


def acting(folder: Path, **options: Any) -> Reasoner:
    """The tests' own tiny decoder with a steerer."""
    base = Reasoner.load(own.save(own.decoder(), folder))
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16, **options)).eval()
    return replace(base, decider=Decider(heads, None, random_steerer(heads)))


def test_a_reasoner_keeps_what_its_layer_does(tmp_path: Path) -> None:
    made = acting(tmp_path / "base")
    made.save_layer(tmp_path / "layer")
    again = Reasoner.load(tmp_path / "layer")
    common: dict[str, Any] = {"plan": "steps", "budget": 9, "use_prediction": False, "temperature": 1.0}
    asks = [made.request(str(i), "2 + 2", seed=i, **common) for i in range(4)]
    want = made.engine().run(asks)
    assert again.engine().run(asks) == want != replace(made, decider=None).engine().run(asks)
    bare = again.unpredicted()
    assert bare.decider is not None and bare.decider.card is None and bare.engine().run(asks) == want


def test_labels_are_drawn_at_their_own_settings(tmp_path: Path) -> None:
    made = replace(acting(tmp_path / "base", policy=5), modulate=True)
    assert made.engine().modulate
    bare = made.unpredicted()
    assert not bare.engine().modulate and bare.engine().steering is not None


def test_a_layer_without_an_overlay_leaves_no_overlay_of_another_behind(tmp_path: Path) -> None:
    made = acting(tmp_path / "base")
    name, weight = next(iter(made.backbone.module.named_parameters()))  # type: ignore[attr-defined]
    replace(made, overlay=Overlay({name: weight.detach() + 1.0})).save_layer(tmp_path / "layer")
    assert Reasoner.load(tmp_path / "layer").overlay is not None
    made.save_layer(tmp_path / "layer")
    again = Reasoner.load(tmp_path / "layer")
    assert again.overlay is None and again.base == made.base
    (kept,) = [p for n, p in again.backbone.module.named_parameters() if n == name]  # type: ignore[attr-defined]
    assert torch.equal(kept, weight)


def test_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    nano = Reasoner.load("nano")
    assert nano.decider is not None
    mine = codec_fingerprint(nano.codec)
    assert store.load(shipped("nano"), nano.base, mine) is not None, "the shipped layer knows its tokenizer"
    store.save(tmp_path, nano.decider.heads, nano.decider.card, nano.base, tokenizer="0" * 64)
    with pytest.raises(ModelError, match="trained with tokenizer 000000000000, but this base has " + mine[:12]):
        store.load(tmp_path, nano.base, mine)
    assert store.load(tmp_path, nano.base) is not None
    store.save(tmp_path, nano.decider.heads, nano.decider.card, nano.base)
    assert store.load(tmp_path, nano.base, mine) is not None, "a layer from before tokenizers were noted"
    other = OwnCodec(nano.codec.tokenizer)  # type: ignore[attr-defined]
    assert codec_fingerprint(other) == mine
    other.layout = replace(other.layout, plans={**other.layout.plans, "steps": (77,)})
    assert codec_fingerprint(other) != mine
