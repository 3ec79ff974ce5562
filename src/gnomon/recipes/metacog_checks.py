"""What `train metacog` refuses before anything is labelled, or as soon as given labels are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from gnomon.base.config import faults
from gnomon.base.errors import ConfigError, DataError, unknown
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import check_room
from gnomon.training.labels import LabelSet

if TYPE_CHECKING:
    from gnomon.recipes.metacog import MetacogRunConfig


def same_kind(labels: LabelSet, base: Reasoner, config: MetacogRunConfig) -> None:
    """Refuse given labels of another base or of other strategies, before those of the other splits are made."""
    if labels.meta.get("base") != base.base:
        raise DataError(f"the labels in {config.labels} were made by another base than {config.base}; label again")
    wanted = tuple(config.strategies or base.codec.strategies)
    if labels.strategies != wanted:
        had = ",".join(labels.strategies)
        raise DataError(
            f"the labels in {config.labels} are of {had}, this run is of {','.join(wanted)}; write --strategies {had}"
        )


def check(base: Reasoner, config: MetacogRunConfig) -> None:
    """Refuse strategies, blocks and numbers of problems that are not there before anything is labelled."""
    known = base.codec.strategies
    for name in config.strategies or ():
        if name not in known:
            raise unknown("strategy", name, known)
    if config.trial_n and set(config.strategies or known) == {"direct"}:
        raise ConfigError(
            f"trial_n = {config.trial_n}, but direct is the only strategy and does not think, so there is no place for "
            "a trial answer; name one that thinks, such as steps, or leave trial_n out"
        )
    rounds = [p for p in (config.b, config.c)[: len(config.phases) - 1] if p.rounds]
    train = [config.trial_n, *(max(p.problems, p.label_n) for p in rounds)]
    train += [] if config.labels is not None else [config.label_n]
    for split, n in (
        ("train", max(train)), ("val", config.val_n), ("calibration", config.calibration_n), ("test", config.test_n),
    ):  # fmt: skip
        if n:
            check_room(config.tasks, split, n, config.levels)
    try:
        config.heads.metacog(base.backbone.n_layers, base.backbone.hidden_size, tuple(config.strategies or known))
    except ValidationError as error:
        raise ConfigError("heads: " + "; ".join(faults(error))) from None
