"""The learned SlackStop through the engine: it closes where the layer is sure, moves no cap, and its reads count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests import own
from tests.decoding.test_engine import CASES, requests
from tests.decoding.test_running import ASK, ENDLESS, Running, boundaries
from tests.decoding.tiny import ATOMIC, Tiny
from tests.metacognition.test_decide import RUNNING, make_card
from tests.own import Said
from torch import Tensor

from gnomon.base.errors import ConfigError
from gnomon.base.seeds import seed_torch
from gnomon.decoding.engine import Engine
from gnomon.decoding.slack import Sure, factory
from gnomon.metacognition.calibration import Domain
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.readers import TorchReader
from gnomon.model.backbone import OwnBackbone
from gnomon.model.native import NativeBackbone
from gnomon.protocol.layout import Layout


class Closing(Running):
    """A layer that is as sure as `said` says after so many think tokens, else .2; it would lower caps to 1 more."""

    closes = True

    def __init__(self, said: dict[int, float] | None = None, rise: float = 0.0, known: bool = True) -> None:
        super().__init__(upper=1)
        self.said, self.rise, self.known = said or {}, rise, known

    def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: object = None) -> list[Said]:
        return [replace(said, promised=0.95) for said in super().budget(taps, plans, predicted_plans)]

    def running(self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: object = None) -> list[Said]:
        self.asked += used
        sure = [self.said.get(n, min(1.0, 0.2 + self.rise * n)) if self.known else None for n in used]
        return [Said(confidence=c, remaining=0.0, upper=1) for c in sure]


def test_it_closes_at_the_first_boundary_that_is_sure_and_reads_every_one_before() -> None:
    backbone = Tiny("running", lean={**ENDLESS, 10: 2.0})
    ask = replace(ASK, temperature=1.0)
    (plain,) = Engine(backbone, ATOMIC, Closing()).run([ask])
    places = boundaries(plain)
    assert plain.used == 20 and len(places) > 4
    layer = Closing({places[2]: 0.98, places[3]: 1.0})
    (closed,) = Engine(backbone, ATOMIC, layer, rules=factory(Sure(1.0, 0.97))).run([ask])
    assert (closed.used, closed.stop, closed.overshoot) == (places[2], "confidence", 0)
    assert closed.think_ids == plain.think_ids[: places[2]], "up to there it is the same thought"
    assert [r[0] for r in closed.running] == layer.asked == places[:3], "one read a boundary: the cost of the rule"
    assert not closed.closed_naturally and not closed.calibrated
    (never,) = Engine(backbone, ATOMIC, Closing(), rules=factory(Sure(1.0, 0.97))).run([ask])
    assert never.ids == plain.ids and never.stop == "hard" and [r[0] for r in never.running] == places
    (unknown,) = Engine(backbone, ATOMIC, Closing(rise=9.0, known=False), rules=factory(Sure(1.0, 0.01))).run([ask])
    assert unknown.ids == plain.ids, "silent where the confidence is unknown"
    (near,) = Engine(backbone, ATOMIC, Closing({places[1]: 0.94}), rules=factory(Sure(0.02))).run([ask])
    assert near.used == places[1], "as sure as thinking on would make it (.95)"


def test_it_is_off_by_default_and_apart_from_the_running_estimates() -> None:
    backbone = Tiny("running", lean={**ENDLESS, 10: 2.0})
    ask = replace(ASK, temperature=1.0)
    layer = Closing(rise=9.0)
    (plain,) = Engine(backbone, ATOMIC, layer).run([ask])
    assert layer.asked == [] and plain.running == () and plain.stop == "hard"
    unsure = Closing()
    (watched,) = Engine(backbone, ATOMIC, unsure, rules=factory(Sure(1.0, 0.97))).run([ask])
    assert watched.used == plain.used, "its bound of one more token is not the rule's business"
    (both,) = Engine(backbone, ATOMIC, Closing(), running=True, rules=factory(Sure(1.0, 0.97))).run([ask])
    assert both.used == boundaries(plain)[0] + 1, "with running estimates the bound acts as without the rule"


def test_layers_that_cannot_say_are_refused_by_name() -> None:
    for layer in (None, Running()):
        with pytest.raises(ConfigError, match=r"'sure' needs a layer .*--trial-n"):
            Engine(Tiny("no"), ATOMIC, layer, rules=factory(Sure())).run([ASK])


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_no_cap_moves_whatever_it_says(layout: Layout, lean: dict[int, float]) -> None:
    layout = replace(layout, boundary=frozenset(range(19, 26)))
    asked = [r for r in requests(64, "sure") if r.budget != "predicted"]
    backbone = Tiny("sure", lean=lean)
    free = Engine(backbone, layout, Closing(), max_batch=16).run(asked)
    traces = Engine(backbone, layout, Closing(rise=0.06), max_batch=16, rules=factory(Sure(1.0, 0.9))).run(asked)
    alone = Engine(backbone, layout, Closing(rise=0.06), max_batch=1, rules=factory(Sure(1.0, 0.9))).run(asked)
    for request, before, trace, single in zip(asked, free, traces, alone, strict=True):
        trace.check()
        assert trace.used <= before.used and trace.overshoot == 0 and trace.ids == single.ids
        assert request.budget is None or trace.used <= int(request.budget)
        assert trace.budget_effective == before.budget_effective
        assert trace.think_ids[: trace.used] == before.think_ids[: trace.used]
    assert {"confidence"} < {t.stop for t in traces}


@pytest.mark.parametrize("native", [True, False])
def test_real_heads_close_alike_in_c_and_in_torch(native: bool) -> None:
    """Heads and base of random weights; threshold at the median of what they say, so that it fires."""
    net, layout = own.decoder("sure", streams=1), own.layout()
    with torch.no_grad():  # nodes begin often
        net.unembed.weight[sorted(layout.boundary)] *= 3.0
    seed_torch("sure-heads")
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16, closing=True)).eval()
    torch.nn.init.normal_(heads.conf_head[2].weight, std=2.0)  # type: ignore[arg-type]
    eye = tuple(tuple(float(i == k) for k in range(32)) for i in range(32))
    card = make_card(
        heads, running=RUNNING.model_copy(update={"closing_plans": ("verify",)}),
        domain=Domain(layer=0, centres=((0.0,) * 32,), precision=eye, threshold=1e9),
    )  # fmt: skip
    decider = Decider(heads, card)
    if not native:
        decider.reader = TorchReader(heads, card)
    backbone = (NativeBackbone if native else OwnBackbone)(net)
    ask = replace(ASK, plan="verify", budget=24, use_prediction=False, temperature=1.0)
    asked = [replace(ask, id=f"{i}", prompt_ids=(40 + i, 41, 42)) for i in range(12)]
    traces = Engine(backbone, layout, decider, rules=factory(Sure(-1.0))).run(asked)
    said = sorted(c for t in traces for _, _, c in t.running if c is not None)
    assert len(said) > 6
    at = said[len(said) // 2]
    want = [next((u for u, _, c in t.running if c is not None and c >= at and u < t.used), t.used) for t in traces]
    closed = Engine(backbone, layout, decider, rules=factory(Sure(1.0, at))).run(asked)
    assert [t.used for t in closed] == want and want != [t.used for t in traces]


def test_a_grant_asks_for_the_whole_thought_and_not_for_closing_here() -> None:
    """Low confidence in closing here says that the answer is not there yet, not that the thought will fail."""
    backbone, ask = Tiny("grant", lean={**ENDLESS, 10: 2.5}), replace(ASK, temperature=1.0, budget="predicted")
    plain, granted = replace(ask, id="plain"), replace(ask, id="granted", grant=5)

    class Doubt(Closing):
        """Needs 50 more tokens, sure of the whole thought as it was told."""

        promise = 0.95

        def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: object = None) -> list[Said]:
            said = super().budget(taps, plans, predicted_plans)
            return [replace(each, promised=self.promise, predicted=8.0, clipped=8) for each in said]

        def running(
            self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: object = None
        ) -> list[Said]:
            return [replace(each, upper=50) for each in super().running(taps, plans, used, calibrated)]

    sure, unsure = Doubt(), Doubt()
    unsure.promise = 0.3
    for layer, used in ((sure, 8), (unsure, 13)):
        one, two = Engine(backbone, ATOMIC, layer, running=True).run([plain, granted])
        assert one.running and all(c is not None and c < 0.5 for _, _, c in two.running)
        assert (one.used, two.used) == (8, used)
