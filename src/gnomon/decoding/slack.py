"""The soft layer: rules that may bring the close of a think block nearer, and nothing else. Pure, no model, no text.

A rule sees one think position at a time (`SoftView`) before the token is chosen and answers with a bias for the end
tag's next token, a cause to close with at once, or neither. It never sees the counter: the hard cap is kept by
`BudgetState` whatever the rules say. Rules come from frozen configs (`rule("slack", share=0.2)`), fresh per sample.

How an engine asks them, once for every think position of a row that has rules:

    look = consult(rules, SoftView.of(state, boundary, margin, last))
    if look.cause: state.lower_cap(state.used, look.cause)   # its own end tag is still `natural`
    logits[state.tag_next] += look.bias
    ... choose a token ...
    if leaned(look, margin, token, state.tag_next): state.lean()   # before `next`; else `slack` would read `natural`

Learned. `sure` closes where a layer is as sure of an answer given here as of what thinking on would give: its
confidence at boundaries and before thinking, read from states that are there anyway.

Baselines. The hard cut is no rule but a budget; `cut` closes at a number of tokens of its own. Both write the layout's
transition before the end tag where it has one: hard cut with message. ThinkBrake is `margin`. `answer` (answer
probability, Dynasor, DEER) needs a trial answer per boundary. No state that is there anyway holds it: every probe costs
an end tag, an answer tag and an answer of extra passes. So the engine does not run it (`factory` refuses); `replay`
measures it, and any other rule, on recorded uncapped thoughts, whose trial answers come from resumed requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final, NamedTuple, Protocol

from gnomon.base.errors import ConfigError, unknown
from gnomon.decoding.budget import BudgetState, SoftCause
from gnomon.protocol.trace import Request

NAN: Final = math.nan
NOTHING: Final[tuple[float, SoftCause | None]] = (0.0, None)


@dataclass(frozen=True)
class SoftView:
    """One think position of one row, before the token is chosen.

    used: think tokens counted. cap: the present one. boundary: the last token ended a node, or the next one begins one
    (atomic nodes: in the logits, hence False where no rule wants the margin). margin: best logit minus that of the end
    tag's next token, ≥ 0; NaN where no rule wants it. last: the newest token of the block, -1 at the start. begun:
    tokens of an end tag that the model has begun. answer: length-normalised probability of a trial answer given here,
    NaN where none was made (replay only). confidence: the layer's calibrated probability that closing here gives a
    right answer; NaN where it is unknown or was not read (anywhere but behind a node boundary). promise: its
    probability, before thinking, that the whole thought does; NaN where it is unknown.
    """

    used: int
    cap: int | None
    boundary: bool
    margin: float
    last: int
    begun: int = 0
    answer: float = NAN
    confidence: float = NAN
    promise: float = NAN

    @classmethod
    def of(
        cls,
        state: BudgetState,
        boundary: bool,
        margin: float,
        last: int,
        confidence: float = NAN,
        promise: float = NAN,
    ) -> SoftView:
        """The view of a running request."""
        return cls(state.used, state.cap, boundary, margin, last, state.held, NAN, confidence, promise)


class SoftRule(Protocol):
    """One running rule of one sample. wants_*: whether it reads these fields of the view; margin: and `boundary`.

    A row whose rules all want a confidence and no margin is asked only where one was read, others at every position.
    """

    @property
    def wants_margin(self) -> bool: ...
    @property
    def wants_answer(self) -> bool: ...
    @property
    def wants_confidence(self) -> bool: ...

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        """(bias for the logit of the end tag's next token, cause to close with at once or None)."""


class RuleConfig(Protocol):
    """The frozen values of a rule."""

    def fresh(self) -> SoftRule:
        """A rule at the start of a block."""


Rules = Callable[[Request], Sequence[SoftRule]]


class Look(NamedTuple):
    """What all rules of a row say together."""

    bias: float
    cause: SoftCause | None


def consult(rules: Iterable[SoftRule], view: SoftView) -> Look:
    """Ask every rule (those with a memory must see every position): the strongest bias, the first cause.

    A bias that is negative or not a number would push the close away; it counts as none.
    """
    bias, cause = 0.0, None
    for each in rules:
        push, why = each.look(view)
        if push > bias:
            bias = push
        cause = cause or why
    return Look(bias, cause)


def leaned(look: Look, margin: float, token: int, tag_next: int) -> bool:
    """Whether `token` is the end tag's because of the bias. margin: of the logits before the bias.

    Exact for greedy decoding: at margin 0 the tag was the model's own choice. A sampled tag that was not the most
    likely token counts as leaned, which errs towards "censored" and never calls an eased close natural.
    """
    return look.bias > 0 and token == tag_next and not margin <= 0


# -- the rules ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SlackStop:
    """Ease the model to the close in the last `share` of the cap: a bias on the end tag, rising linearly to `strength`.

    At boundaries only, and while the tag that it began there is not complete. Training-free. A grace period that waits
    for a boundary only delays the cut; the ramp also makes the model want to close (budget-rules.md, failure 12).
    """

    share: float = 0.25
    strength: float = 8.0

    def __post_init__(self) -> None:
        _check("slack", "share", self.share, lambda x: 0 < x <= 1, "in (0, 1], a share of the budget")
        _check("slack", "strength", self.strength, lambda x: 0 < x < math.inf, "a number > 0, in logits")

    def fresh(self) -> SoftRule:
        return _Slack(self)

    def bias(self, used: int, cap: int) -> float:
        """The ramp: 0 up to the last share, `strength` at the cap."""
        start = cap * (1.0 - self.share)
        return self.strength * (used - start) / (cap - start) if used > start else 0.0


class _Slack:
    wants_margin, wants_answer, wants_confidence = True, False, False

    def __init__(self, config: SlackStop) -> None:
        self._config, self._leaning = config, False

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        if view.begun:
            here = self._leaning
        else:
            here = view.boundary
        # At the cap itself the cut follows, with its own cause and transition.
        if not here or view.cap is None or view.used >= view.cap:
            self._leaning = False
            return NOTHING
        bias = self._config.bias(view.used, view.cap)
        self._leaning = bias > 0
        return bias, None


@dataclass(frozen=True)
class Margin:
    """Close at a boundary where the end tag is nearly the best token: margin ≤ threshold (ThinkBrake, 2510.00546).

    The threshold belongs to the model and domain it was fitted on; fit it on the calibration split.
    """

    threshold: float = 1.0
    wants_margin = True
    wants_answer = wants_confidence = False

    def __post_init__(self) -> None:
        _check("margin", "threshold", self.threshold, lambda x: 0 <= x < math.inf, "a number ≥ 0, in logits")

    def fresh(self) -> SoftRule:
        return self

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        return (0.0, "confidence") if view.boundary and view.margin <= self.threshold else NOTHING


@dataclass(frozen=True)
class AnswerProbability:
    """Close at a boundary where a trial answer is probable enough. For `replay` only: probes cost extra passes."""

    threshold: float = 0.9
    wants_margin = wants_confidence = False
    wants_answer = True

    def __post_init__(self) -> None:
        _check("answer", "threshold", self.threshold, lambda x: 0 < x <= 1, "in (0, 1], a probability")

    def fresh(self) -> SoftRule:
        return self

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        return (0.0, "confidence") if view.boundary and view.answer >= self.threshold else NOTHING


@dataclass(frozen=True)
class Sure:
    """Close where an answer given here is as surely right as thinking on would make it: the learned SlackStop.

    By the layer's running confidence, "closing here is right": at least `threshold`, and at most `gap` below its
    promise for the whole thought, made before thinking. A threshold alone (gap = 1) saves less (docs/log.md): it thinks
    on where that is in vain. Where confidence or promise is unknown (a foreign prompt, a plan that the card was not
    fitted for) the rule is silent. It costs one read of the heads a boundary and no extra pass.
    """

    gap: float = 0.03
    threshold: float = 0.0
    wants_margin = wants_answer = False
    wants_confidence = True

    def __post_init__(self) -> None:
        _check("sure", "gap", self.gap, lambda x: -1 <= x <= 1, "in [-1, 1], a difference of probabilities")
        _check("sure", "threshold", self.threshold, lambda x: 0 <= x <= 1, "in [0, 1], a probability")

    def fresh(self) -> SoftRule:
        return self

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        enough = view.confidence >= max(self.threshold, view.promise - self.gap)  # False at NaN
        return (0.0, "confidence") if enough and not math.isnan(view.promise) else NOTHING


@dataclass(frozen=True)
class FixedCut:
    """Close at `tokens` think tokens, wherever that is: the constant policy, below whatever cap there is."""

    tokens: int
    wants_margin = wants_answer = wants_confidence = False

    def __post_init__(self) -> None:
        _check("cut", "tokens", self.tokens, lambda x: isinstance(x, int) and x >= 0, "a whole number ≥ 0")

    def fresh(self) -> SoftRule:
        return self

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        return (0.0, "slack") if view.used + view.begun >= self.tokens else NOTHING


@dataclass(frozen=True)
class LoopGuard:
    """Close when the newest tokens are one piece over and over: `repeats` copies of any period up to `period`, and at
    least `least` tokens of it, so that short repetitions with a meaning (a row of equal digits) pass.

    Per token the newest one is compared with the last `period` tokens; only periods that match now keep a run length.
    """

    period: int = 48
    repeats: int = 3
    least: int = 48

    def __post_init__(self) -> None:
        for name, low in (("period", 1), ("repeats", 2), ("least", 2)):
            whole = lambda x, low=low: isinstance(x, int) and x >= low  # noqa: E731
            _check("loop", name, getattr(self, name), whole, f"a whole number ≥ {low}")

    def fresh(self) -> SoftRule:
        return _Loop(self)


class _Loop:
    wants_margin, wants_answer, wants_confidence = False, False, False

    def __init__(self, config: LoopGuard) -> None:
        self._window: deque[int] = deque(maxlen=config.period)  # newest first
        self._runs: dict[int, int] = {}  # period -> how many of the newest tokens equal the one a period before
        self._need = {p: max(config.least, p * config.repeats) - p for p in range(1, config.period + 1)}

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        token, runs, found = view.last, self._runs, False
        if token < 0:
            return NOTHING
        here: dict[int, int] = {}
        for period, old in enumerate(self._window, 1):
            if old == token:
                here[period] = run = runs.get(period, 0) + 1
                found = found or run >= self._need[period]
        self._runs = here
        self._window.appendleft(token)
        return (0.0, "loop") if found else NOTHING


# -- names ----------------------------------------------------------------------------------------------------------
RULES: Final[dict[str, Callable[..., RuleConfig]]] = {
    "slack": SlackStop,
    "margin": Margin,
    "sure": Sure,
    "loop": LoopGuard,
    "cut": FixedCut,
    "answer": AnswerProbability,
}


def rule(name: str, **values: Any) -> RuleConfig:
    """The config of a named rule. Raises UnknownNameError or ConfigError, naming the nearest name or the value."""
    if name not in RULES:
        raise unknown("rule", name, RULES)
    make = RULES[name]
    known = {f.name: f for f in fields(make)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown(f"value of rule {name!r}", key, known)
    missing = [key for key, f in known.items() if f.default is MISSING and key not in values]
    if missing:
        raise ConfigError(f"rule {name!r} needs {missing[0]}; write rule({name!r}, {missing[0]}=…)")
    return make(**values)


def factory(*configs: RuleConfig) -> Rules:
    """Fresh rule objects for every sample, for the engine. Raises ConfigError for a rule that it could not honour."""
    for config in configs:
        if config.fresh().wants_answer:
            raise ConfigError(
                f"{type(config).__name__} needs a trial answer at every boundary, which costs extra passes; the engine "
                "makes none. Measure it with gnomon.decoding.slack.replay, or use margin, slack or cut."
            )
    return lambda request: [config.fresh() for config in configs]


def replay(config: RuleConfig, views: Iterable[SoftView]) -> tuple[int, SoftCause] | None:
    """(think tokens used, cause) where the rule would have closed a recorded thought; None where it would not.

    views: every think position in order, from the start. A bias closes where it makes the tag the best token (greedy).
    """
    running = config.fresh()
    for view in views:
        look = consult((running,), view)
        if look.cause is not None:
            return view.used, look.cause
        if view.margin > 0 and look.bias >= view.margin:
            return view.used, "slack"
    return None


def _check(name: str, key: str, value: object, good: Callable[[Any], bool], what: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not good(value):
        raise ConfigError(f"rule {name!r}: {key} must be {what}; given {value!r}")
