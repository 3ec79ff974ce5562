"""What two processes do in `test_distributed.py`; started by torchrun, results go to OUT/facts.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gnomon.base import seeds
from gnomon.data.corpus import BinSource, StepData
from gnomon.model.decoder import Decoder
from gnomon.recipes import pretrain_run, pretraining
from gnomon.recipes.pretrain import Objective, step_losses
from gnomon.recipes.pretrain_config import resolve, resume_point, settle
from gnomon.training import optim
from gnomon.training.loop import fit
from gnomon.training.parallel import Parallel, state_of, whole
from gnomon.training.team import ALONE, Team, joined


def fresh(vocab: int, config: Any) -> Decoder:
    seeds.seed_torch("two", "init")
    from gnomon.model.decoder import preset

    return Decoder(preset("micro", vocab, **config.model.changes()))


def gradients(data: StepData, decoder: Decoder, team: Team, mode: Any, micro: int | None) -> dict[str, torch.Tensor]:
    parallel = Parallel(Objective(decoder, "fp32"), decoder.blocks, team, mode)
    for loss, _ in step_losses(data, parallel, micro):
        (loss * parallel.factor).backward()
    return {name: whole(p.grad) for name, p in decoder.named_parameters() if p.grad is not None}


def after_steps(source: BinSource, decoder: Decoder, team: Team, mode: Any, config: Any) -> dict[str, torch.Tensor]:
    parallel = Parallel(Objective(decoder, "fp32"), decoder.blocks, team, mode)
    optimizers = optim.build(decoder, config.optim)
    fit(
        lambda step: step_losses(source.step(step), parallel),
        optimizers, 3, team=team, factor=parallel.factor,
    )  # fmt: skip
    return state_of(decoder)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Greatest difference, relative to the largest value of the tensor (at least 1e-3)."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp_min(1e-3)) for k in a)


def main(out: Path, data: Path, tiny: dict[str, Any]) -> None:
    facts: dict[str, Any] = {}
    with joined("cpu") as team:
        config = resolve(None, tiny)[0]
        tok, source, _ = pretrain_run._data(config, data, None, team, pretrain_run.StopSignals())
        assert isinstance(source, BinSource)
        step = source.step(0)
        alone = gradients(step, fresh(tok.vocab_size, config), ALONE, "ddp", None)
        for mode in ("ddp", "fsdp"):
            for micro in (None, 1):
                there = gradients(step, fresh(tok.vocab_size, config), team, mode, micro)
                facts[f"gradients/{mode}/{micro}"] = apart(alone, there)
        ends = {
            mode: after_steps(source, fresh(tok.vocab_size, config), team, mode, config) for mode in ("ddp", "fsdp")
        }
        facts["export"] = apart(ends["ddp"], ends["fsdp"])
        facts["told"] = team.tell({"rank": team.rank, "ä": [1, None]})
        facts["total"] = team.total({"x": team.rank + 1.0, "y": 0.5})
        facts["any"] = [team.any(team.rank == 1), team.any(False)]
        # a run of one process goes on in two, sharded, and the other way round
        place, found = resume_point("auto", out / "run")
        settled, changed = settle(found.values(), resolve(None, {"steps": 6, "parallel": "fsdp"}, found.values())[0])
        start = pretraining.start_at(found.path, changed)
        assert place is not None
        facts["run"] = pretrain_run.run(settled, place, start=start, team=team)
        stopping = {**tiny, "steps": 50, "save_every": 50}
        facts["stop"] = pretrain_run.run(
            resolve(None, stopping)[0], out / "stop", data=data, team=team,
            stop=lambda done: team.rank == 1 and done == 2,
        )  # fmt: skip
        if team.leader:
            (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
