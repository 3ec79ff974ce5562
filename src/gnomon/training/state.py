"""What a checkpoint needs beside the weights to go on bit for bit: optimiser states and where training stood.

Files: `train/<optimiser>.safetensors`, tensors named `<parameter>|<state>`, and `train/state.json`. Learning rates are
not stored: they follow from the config and the step, so a changed rate wins on resume. Nor is a random state: what a
step sees depends on the step number alone. Tensors are whole, whatever number of processes trained, so a checkpoint
of one process resumes in two and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import CheckpointError
from gnomon.training.parallel import part_like, whole

FOLDER: Final = "train"
STATE: Final = "state.json"
VERSION: Final = 1


def gather_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """File name -> whole tensors of every optimiser; a collective call when the model is sharded."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        _file(number, optimizer): {
            f"{names[parameter]}|{key}": whole(value)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        for number, optimizer in enumerate(optimizers)
    }


def save_state(folder: Path, states: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write the states of all optimisers and `facts` (JSON-able; `step` among them) below folder/train."""
    for name, tensors in states.items():
        save_tensors(folder / FOLDER, name, tensors)
    write_atomic(folder / FOLDER / STATE, json.dumps({"version": VERSION, **facts}, indent=1) + "\n")


def load_state(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put the saved states into optimisers over `model`, in place of what they hold; returns the facts.

    Raises CheckpointError for missing or damaged files, and for states of parameters that this model does not have.
    """
    facts = read_facts(folder)
    parameters = dict(model.named_parameters())
    for number, optimizer in enumerate(optimizers):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found: dict[nn.Parameter, dict[str, Tensor]] = {}
        for name, value in load_tensors(folder / FOLDER, _file(number, optimizer)).items():
            owner, _, key = name.rpartition("|")
            parameter = parameters.get(owner)
            if parameter is None or id(parameter) not in mine:
                raise CheckpointError(f"{folder.name}: optimiser state {name!r} belongs to no parameter of this model")
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder.name}: optimiser state {name!r} is {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
            # A step count has no shape; fused kernels want it beside the parameter.
            found.setdefault(parameter, {})[key] = (
                part_like(value, parameter) if value.ndim else value.to(parameter.device)
            )
        optimizer.state.clear()
        optimizer.state.update(found)
    return facts


def read_facts(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError when there is none."""
    path = folder / FOLDER / STATE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        step = facts["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed: {FOLDER}/{STATE} is missing or damaged ({error}); "
            "give a checkpoint-<step> folder of a training run"
        ) from None
    if not isinstance(step, int) or facts.get("version") != VERSION:
        raise CheckpointError(f"{folder}: {FOLDER}/{STATE} is of another version; train with the gnomon that wrote it")
    return dict(facts)


def _file(number: int, optimizer: torch.optim.Optimizer) -> str:
    return f"{number}-{type(optimizer).__name__.lower()}.safetensors"
