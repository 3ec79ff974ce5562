"""Estimates against what really happens: the same storages counted on real tensors, sizes on disk, resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnomon.base import seeds
from gnomon.model import fused
from gnomon.model.decoder import Decoder, preset
from gnomon.training import estimate as est
from gnomon.training import optim
from gnomon.training.state import gather_state

TINY = {"channels": 32, "layers": 1, "heads": 2, "context": 128, "streams": 1}


class Loss(nn.Module):
    def __init__(self, low: bool = False, **changes: Any) -> None:
        super().__init__()
        self.decoder, self.low = Decoder(preset("micro", 64, **{**TINY, **changes})), low

    def forward(self, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low):
            seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            logits = self.decoder(ids, positions, seen.expand(len(ids), 1, -1, -1)).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors take the plain path; so do the real ones that they are compared with."""
    monkeypatch.setattr(fused, "usable", lambda x: False)


def build(module: nn.Module) -> list[torch.optim.Optimizer]:
    assert isinstance(module, Loss)
    return optim.build(module.decoder, optim.OptimConfig())


def counted(make: Callable[[], nn.Module], rows: int, length: int, passes: int) -> tuple[int, int, int]:
    """(weights, states, peak) in bytes on real tensors."""
    with est.Watch() as watch:
        network = make().train()
        weights = watch.now
        optimizers = build(network)
        est.step(network, optimizers, est.batch(rows, length, 64))
        states = watch.now - weights
        watch.peak = watch.now
        est.step(network, optimizers, est.batch(rows, length, 64), passes)
    return weights, states, watch.peak


@pytest.mark.parametrize(
    ("changes", "low", "passes"), [({}, False, 1), ({"streams": 2}, True, 2), ({"layers": 3}, True, 1)]
)
def test_fake_tensors_count_as_real_ones(changes: dict[str, int], low: bool, passes: int) -> None:
    make = partial(Loss, low, **changes)
    traced = est.trace(make, build, 3, 96, 64, passes=passes, blocks=lambda m: m.decoder.blocks)
    assert (traced.weights, traced.states, traced.peak) == counted(make, 3, 96, passes)
    real = make()
    assert traced.parameters == sum(p.numel() for p in real.parameters())
    assert traced.block == max(sum(p.nbytes for p in b.parameters()) for b in real.decoder.blocks)
    assert traced.outside == 4 * traced.parameters - sum(p.nbytes for b in real.decoder.blocks for p in b.parameters())


def test_what_the_forward_pass_saves_is_what_real_hooks_see() -> None:
    seeds.seed_torch("estimate")
    network, inputs = Loss(True), est.batch(3, 96, 64)
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers(), *inputs)}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(*inputs)
    held = sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in own)
    assert est.trace(partial(Loss, True), build, 3, 96, 64).saved == held


def test_tracing_draws_no_random_number_and_leaves_the_model_alone() -> None:
    seeds.seed_torch("estimate")
    before = torch.get_rng_state()
    est.trace(Loss, build, 1, 32, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_rows_longer_rows_and_checkpointing_move_memory_as_they_should() -> None:
    deep = partial(Loss, layers=3)
    few, many = (est.trace(deep, build, rows, 96, 64) for rows in (2, 4))
    assert many.saved == pytest.approx(2 * few.saved, rel=0.05)

    def cheap() -> Loss:
        module = deep()
        module.decoder.checkpointing = True
        return module

    assert est.trace(cheap, build, 4, 96, 64).peak < 0.75 * many.peak


def test_processes_share_what_the_mode_shares() -> None:
    traced = est.trace(Loss, build, 2, 96, 64, blocks=lambda m: m.decoder.blocks)
    assert est.shared(traced, 1, "fsdp") == traced.peak
    assert est.shared(traced, 2, "ddp") == traced.peak + traced.weights
    shares = [est.shared(traced, world, "fsdp") for world in (2, 4, 8)]
    assert shares == sorted(shares, reverse=True)


def test_an_estimate_says_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = partial(est.estimate, Loss, build, rows=4, length=96, vocab=64, steps=1000, folder=tmp_path / "not" / "there")
    found = go(seconds=0.2)
    assert found["warnings"] == []
    assert found["tokens"] == 4 * 96 * 1000
    assert found["minutes"] == pytest.approx(found["seconds_per_step"] * 1000 / 60, rel=0.02)
    halves = go(seconds=0, world=2, micro_rows=1)
    assert halves["seconds_per_step"] is None
    assert halves["activations_mb"] < 0.3 * found["activations_mb"]
    monkeypatch.setattr(est, "_free", lambda device, folder: (2**20, 2**10))
    words = " ".join(go(seconds=1)["warnings"])
    assert "memory: about" in words
    assert "disk: the checkpoints" in words
    assert "time: not measured" in words


def test_the_size_of_a_checkpoint_is_that_of_its_tensors() -> None:
    network = Loss()
    optimizers = build(network)
    est.step(network, optimizers, est.batch(2, 96, 64))
    tensors = [t for file in gather_state(network, optimizers).values() for t in file.values()]
    size = sum(t.nbytes for t in (*tensors, *network.state_dict().values()))
    assert est.trace(Loss, build, 2, 96, 64).stored == size


CHILD = """
import json, resource, sys
from pathlib import Path
from gnomon.recipes import pretrain_run as pr
from gnomon.recipes.pretrain_config import resolve
values, folder = json.loads(sys.argv[2]), Path(sys.argv[3])
config, _ = resolve(None, values)
if sys.argv[1] == "estimate":
    print(json.dumps(pr.estimate(config, folder)))
else:
    facts = pr.run(config, folder)
    size = sum(p.stat().st_size for p in Path(facts["checkpoint"]).rglob("*") if p.is_file())
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "disk_mb": size / 2**20,
                      "seconds": facts["seconds"] / facts["steps"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"model.preset": "micro"},
        {"model.preset": "nano", "rows": 16, "precision": "fp32"},
        {"model.preset": "micro", "model.streams": 1, "rows": 32},
        {"model.preset": "nano", "rows": 16, "precision": "fp32", "thrifty": True},
    ],
)
def test_memory_and_disk_of_a_real_run(values: dict[str, Any], tmp_path: Path) -> None:
    """Peak resident memory within 25 % of the estimate, the checkpoint within 10 %.

    thrifty: the allocator gives back what is freed; then the count of what lives is enough, without a margin.
    """
    thrifty = values.get("thrifty", False)
    values = {k: v for k, v in values.items() if k != "thrifty"}
    values = {"steps": 8, "save_every": 4, "eval_every": 4, "corpus.records": 4000, "workers": 1, **values}
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if thrifty else {})
    said, was = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", CHILD, mode, json.dumps(values), str(tmp_path / "run")],
                capture_output=True, text=True, env=env, check=True,
            ).stdout.splitlines()[-1]
        )
        for mode in ("estimate", "run")
    )  # fmt: skip
    if thrifty:
        said["memory_mb"] -= round((est.MARGIN - 1) * said["step_peak_mb"])
    shown = f"{values}: said {said['memory_mb']} MB, was {was['peak_mb']:.0f} MB; disk {said['checkpoint_mb']} / "
    print(shown + f"{was['disk_mb']:.1f} MB; step {said['seconds_per_step']} / {was['seconds']:.2f} s")
    if thrifty:
        assert said["step_peak_mb"] < was["peak_mb"] < 1.05 * said["memory_mb"], shown
    else:
        assert said["memory_mb"] == pytest.approx(was["peak_mb"], rel=0.25), shown
    assert said["checkpoint_mb"] == pytest.approx(was["disk_mb"], rel=0.1), shown
