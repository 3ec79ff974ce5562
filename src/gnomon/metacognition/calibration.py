"""The calibration card: a versioned JSON file beside the weights, validated at load, applied exactly once.

A card turns what the heads say into what is promised: a probability (temperature), a plan (threshold in cost order)
and a budget (conformal clip), inside the domain that it was fitted on (decisions.md §4).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gnomon.base.config import faults
from gnomon.base.errors import CheckpointError, ModelError

VERSION: Final = 1
FILE_NAME: Final = "calibration.json"
NO_BOUND: Final = 100.0  # an offset so large that the upper bound is above every cap
Floats = NDArray[np.float64]

# Fits keep temperatures in [1/20, 20]; the others only leave out what no fit of sound heads gives.
Temperature = Annotated[float, Field(ge=0.01, le=100.0)]
Shift = Annotated[float, Field(ge=-1e4, le=1e4)]
Offset = Annotated[float, Field(ge=-NO_BOUND, le=NO_BOUND)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Temperatures(_Frozen):
    """Divisors of the confidence logits, one for each place where confidence is read."""

    before: Temperature
    after: Temperature


class Shifts(_Frozen):
    """What is added to the divided logits (Platt scaling): chosen plans are right more often than sampled ones."""

    before: Shift = 0.0
    after: Shift = 0.0


class BudgetClip(_Frozen):
    """Additive offsets in log1p(tokens) on the predicted budget.

    tested_offset: covers `tested_level` of correct solutions; operating_offset: what decoding uses, the cheapest
    `level` that loses at most the allowed accuracy on the calibration split.
    """

    tested_level: float = Field(default=0.90, gt=0.0, lt=1.0)
    tested_offset: Offset
    level: float = Field(gt=0.0, le=1.0)
    operating_offset: Offset
    n: int = Field(ge=1)


class Domain(_Frozen):
    """Mahalanobis distance of a state at the think tag to the nearest centre, and the distance still called familiar.

    layer: the tapped block whose state is judged; centres [M, C], precision [C, C] (shared), threshold. The raw state
    is used, not g: g keeps what the heads need and drops what is foreign (docs/log.md, 2026-11-21).
    """

    layer: int = Field(ge=0)

    centres: tuple[tuple[float, ...], ...]
    precision: tuple[tuple[float, ...], ...]
    threshold: float = Field(gt=0.0, le=1e9)

    @model_validator(mode="after")
    def _shapes(self) -> Domain:
        dim = len(self.precision)
        if not self.centres or any(len(row) != dim for row in (*self.precision, *self.centres)):
            raise ValueError("domain centres and precision disagree about the size of a state")
        return self

    def __eq__(self, other: object) -> bool:
        """By fields: what `whitened` remembers is an array and does not count."""
        return isinstance(other, Domain) and all(
            getattr(self, name) == getattr(other, name) for name in type(self).model_fields
        )

    def __hash__(self) -> int:
        return hash((self.layer, self.threshold, self.centres))

    @cached_property
    def whitened(self) -> tuple[Floats, Floats]:
        """A root R of the precision (R Rᵀ) and the centres times R: the distance is Euclidean there."""
        values, vectors = np.linalg.eigh(np.asarray(self.precision, dtype=np.float64))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        return root, np.asarray(self.centres, dtype=np.float64) @ root

    def distance(self, states: Floats) -> Floats:
        """States [N, C] of block `layer` -> distance [N] to the nearest centre."""
        root, centres = self.whitened
        gaps = (np.asarray(states, dtype=np.float64) @ root)[:, None] - centres
        return np.asarray(np.sqrt(np.square(gaps).sum(-1).min(1)))


class Running(_Frozen):
    """Running estimates at node boundaries (row C8).

    offset: in log1p(tokens), on the predicted remainder; with it `level` of the needs of solutions fit (n of them);
    NO_BOUND where these were too few: the remainder may be anything.
    temperature, shift: of the confidence logit read there. closing_plans: that confidence is of closing at the
    boundary, and was fitted on trial answers under these plans; empty: it is of the whole thought. whole_temperature,
    whole_shift: of the confidence logit read before thinking, for the outcome without a cap under these plans.
    """

    offset: Offset
    level: float = Field(gt=0.0, lt=1.0)
    temperature: Temperature
    shift: Shift
    n: int = Field(ge=0)
    closing_plans: tuple[str, ...] = ()
    whole_temperature: Temperature = 1.0
    whole_shift: Shift = 0.0

    def upper(self, raw: Floats) -> NDArray[np.int64]:
        """Predicted log1p(remaining tokens) [N] -> conformal upper bound in whole tokens [N]."""
        return clip_tokens(raw, self.offset)

    def confidence(self, raw: Floats) -> Floats:
        """Raw logits [N] -> probabilities [N]."""
        return scaled(raw, self.temperature, self.shift)

    def promise(self, raw: float) -> float:
        """The logit read before thinking -> probability that the whole thought gives a right answer."""
        return float(scaled(np.asarray(raw), self.whole_temperature, self.whole_shift))


class Quality(_Frozen):
    """What the card reached on its own calibration data; n rows."""

    n: int = Field(ge=1)
    ece: float
    brier: float
    auroc: float | None


class Fitted(_Frozen):
    """The data that the card was fitted on."""

    dataset: str
    stream: str
    n: int = Field(ge=1)
    before: Quality
    after: Quality


class Card(_Frozen):
    """One calibration. plan_price: what a think token costs in chances of being right, where plans have values.

    `weights` is the fingerprint of the heads; `digest` guards the file against edits.

    running: None where the heads learned nothing at boundaries (all cards before 2026-11-21).
    """

    kind: Literal["gnomon.calibration"] = "gnomon.calibration"
    version: int = VERSION
    weights: str
    plans: tuple[str, ...] = Field(min_length=1)
    cost_order: tuple[str, ...]
    plan_threshold: float = Field(gt=0.0, le=1.0)
    plan_price: float | None = Field(default=None, ge=0.0, le=1.0)
    temperature: Temperatures
    shift: Shifts = Shifts()
    budget_clip: BudgetClip
    domain: Domain
    fitted_plans: tuple[str, ...] = Field(min_length=1)
    best_plan: dict[str, str] = Field(default_factory=dict)
    running: Running | None = None
    fitted: Fitted

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if self.version != VERSION:
            raise ValueError(f"version {self.version} is not {VERSION}; run `gnomon calibrate` again")
        if sorted(self.cost_order) != sorted(self.plans):
            raise ValueError(f"cost_order {self.cost_order} is not a permutation of plans {self.plans}")
        closing = () if self.running is None else self.running.closing_plans
        for name, given in (("plans", self.plans), ("fitted_plans", self.fitted_plans), ("closing_plans", closing)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} {given} names a plan more than once")
        foreign = [p for p in (*self.fitted_plans, *self.best_plan.values(), *closing) if p not in self.plans]
        if foreign:
            raise ValueError(f"plans {foreign} are not among {self.plans}")
        return self

    def digest(self) -> str:
        """Hash of the contents in canonical form; a part that is not there does not enter."""
        text = json.dumps(self._body(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _body(self) -> dict[str, Any]:
        body = self.model_dump(mode="json")
        for name in ("running", "plan_price"):
            if body[name] is None:
                del body[name]
        if self.running is not None and not self.running.closing_plans:
            for name in ("closing_plans", "whole_temperature", "whole_shift"):
                del body["running"][name]
        return body

    def save(self, path: Path) -> None:
        """Write the card as JSON (with its digest) to a file; a folder gets the usual file name."""
        path = path / FILE_NAME if path.is_dir() else path
        body = {**self._body(), "digest": self.digest()}
        partial = path.with_suffix(".partial")
        domain = json.dumps(body["domain"], separators=(",", ":"))  # thousands of numbers: one line
        text = json.dumps({**body, "domain": "@"}, indent=1).replace('"@"', domain)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, weights: str | None = None) -> Card:
        """Read and validate a card; `weights` is the fingerprint of the heads that it must belong to.

        Raises CheckpointError when the file is missing, damaged, edited or fitted on other weights.
        """
        path = path / FILE_NAME if path.is_dir() else path
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(body, dict):
                raise TypeError(f"it is one JSON object, not a {type(body).__name__}")
            stored = body.pop("digest", None)
            card = cls.model_validate(body)
        except FileNotFoundError:
            raise CheckpointError(f"no calibration card at {path}; make one with `gnomon calibrate`") from None
        except (ValueError, TypeError, AttributeError) as err:
            why = "; ".join(faults(err)) if isinstance(err, ValidationError) else err
            raise CheckpointError(f"the calibration card {path} cannot be used: {why}") from err
        if stored != card.digest():
            raise CheckpointError(f"the calibration card {path} was changed after fitting; run `gnomon calibrate`")
        if weights is not None and card.weights != weights:
            raise CheckpointError(
                f"the calibration card {path} was fitted on heads {card.weights[:12]}, but these heads are "
                f"{weights[:12]}; run `gnomon calibrate`"
            )
        return card

    # ---- application: the only place where the card's numbers meet the heads' outputs ----

    def confidence(self, raw: Floats, place: Literal["before", "after"]) -> Floats:
        """Raw logits [N] -> probabilities [N]; temperature and shift of that place, applied once."""
        return scaled(raw, getattr(self.temperature, place), getattr(self.shift, place))

    def choose_plan(self, probs: Floats, solve: Floats | None = None, cost: Floats | None = None) -> NDArray[np.int64]:
        """Index [N] of the chosen plan.

        With a price and values (solve logits and cost in log1p(tokens) [N, K], order of `plans`): the highest value.
        Otherwise from probs [N, K]: the first in cost order whose cumulative probability reaches the threshold.
        """
        if self.plan_price is not None and solve is not None and cost is not None:
            return best_value(solve, cost, self.plan_price)
        return first_reaching(probs, [self.plans.index(p) for p in self.cost_order], self.plan_threshold)

    def clip_budget(self, raw: Floats, which: Literal["operating", "tested"] = "operating") -> NDArray[np.int64]:
        """Predicted log1p(tokens) [N] -> tokens [N] that cover the stated share of correct solutions."""
        clip = self.budget_clip
        return clip_tokens(raw, clip.operating_offset if which == "operating" else clip.tested_offset)

    def covers(self, plan: str, *, predicted_plan: str | None = None, capped_below: bool = False) -> bool:
        """Whether a request is at the point that the card was fitted for.

        predicted_plan: what the card would have chosen, when a user chose instead; capped_below: the effective
        budget is not the clipped prediction.
        """
        if predicted_plan is not None and predicted_plan != plan:
            return False
        return plan in self.fitted_plans and not capped_below


def numbers(*said: Floats | None) -> None:
    """Raises ModelError where the heads said something that is no finite number (None = nothing was said)."""
    if not math.isfinite(sum(float(np.sum(x)) for x in said if x is not None)):
        raise ModelError(
            "the heads gave no number where they read plan, budget and confidence, so the base's states are broken; "
            "look for NaN or infinite values in the base's weights, and for overflow in half precision"
        )


def scaled(raw: Floats, temperature: float, shift: float) -> Floats:
    """Raw logits [N] -> probabilities [N]: sigmoid(raw / temperature + shift), Platt (1999)."""
    return sigmoid(np.asarray(raw, dtype=np.float64) / temperature + shift)


def sigmoid(x: Floats) -> Floats:
    """Numerically safe logistic function."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def first_reaching(probs: Floats, order: Sequence[int], threshold: float) -> NDArray[np.int64]:
    """probs [N, K] -> [N] the first index in `order` whose cumulative probability reaches the threshold."""
    cumulative = np.cumsum(probs[:, list(order)], axis=1)
    cumulative[:, -1] = np.inf  # rounding must not leave a row without a plan
    return np.asarray(order, dtype=np.int64)[(cumulative >= threshold - 1e-12).argmax(1)]


def best_value(solve: Floats, cost: Floats, price: float) -> NDArray[np.int64]:
    """Solve logits and cost in log1p(tokens) [N, K] -> index [N] of the highest chance − price × tokens."""
    return np.asarray((sigmoid(solve) - price * np.maximum(np.expm1(np.minimum(cost, 12.0)), 0.0)).argmax(1))


def clip_tokens(raw: Floats, offset: float) -> NDArray[np.int64]:
    """log1p(tokens) [N] plus an offset -> whole tokens [N], rounded up, never negative.

    Raises ModelError where a prediction is no number.
    """
    numbers(raw)
    tokens = np.expm1(np.minimum(np.asarray(raw, dtype=np.float64) + offset, math.log1p(1e7)))
    return np.maximum(np.ceil(tokens - 1e-9), 0).astype(np.int64)
