"""What was asked and what happened: the one record that everything else reads. Standard library only."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, get_args

from gnomon.base.errors import BudgetError, ConfigError, DataError
from gnomon.protocol.tags import Role, StopCause

VERSION: Final = 1
Finish = Literal["end", "eos", "length", "user"]
Source = Literal["requested", "predicted", "limit"]
Region = Literal["plan", "tag", "think", "answer"]
Scope = Literal["block", "turn", "tool_loop", "session"]


@dataclass(frozen=True)
class Request:
    """One question to the engine.

    prompt_ids: the encoded prompt. plan: a strategy or "predicted". budget: think tokens, None (no cap but the
    context) or "predicted". use_prediction: an explicit number is also lowered to the prediction (decisions.md §4);
    False keeps it as it is (sweeps). temperature 0 is greedy; top_k 0 and top_p 1 switch truncation off.
    max_answer_tokens: cap of the answer, which also raises its reserve; None = the reserve. n: samples.
    think_prefix: think tokens that an earlier run has decided (resume): they are fed, not sampled again, and count.
    scope, spent: what the budget covers, and how many think tokens that scope has used before this request (see
    decoding.scope.Ledger). grant: think tokens that may be added once, above the prediction and never above a number
    asked for, where a boundary reads a confidence below `grant_below` (a layer that says there whether closing is right
    is asked for what it promised of the whole thought instead).
    """

    id: str
    prompt_ids: tuple[int, ...]
    plan: str = "predicted"
    budget: int | Literal["predicted"] | None = "predicted"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_answer_tokens: int | None = None
    n: int = 1
    use_prediction: bool = True
    think_prefix: tuple[int, ...] = ()
    scope: Scope = "turn"
    spent: int = 0
    grant: int = 0
    grant_below: float = 0.5

    def __post_init__(self) -> None:
        budget = self.budget
        if isinstance(budget, str) and budget != "predicted":
            raise BudgetError(f'a budget is a whole number, None or "predicted"; given {budget!r}')
        if budget is not None and not isinstance(budget, str):
            if _whole(budget) is None:
                raise BudgetError(f"a budget is a whole number of think tokens; given {budget!r}")
            if budget < 0:
                raise BudgetError(f"a budget cannot be negative; given {budget}. Write 0 to answer without thinking.")
            self._set("budget", int(budget))
        for name in ("prompt_ids", "think_prefix"):
            ids = [_whole(i) for i in getattr(self, name)]
            if None in ids:
                raise ConfigError(f"request {self.id!r}: {name} must hold token ids, whole numbers")
            self._set(name, tuple(ids))
        if not self.prompt_ids:
            raise ConfigError(f"request {self.id!r} has an empty prompt; give at least one id")
        heat = self.temperature
        if not isinstance(heat, (int, float)) or not (heat == 0 or MIN_TEMPERATURE <= heat < float("inf")):
            raise ConfigError(f"request {self.id!r}: temperature must be 0 or ≥ {MIN_TEMPERATURE}; given {heat!r}")
        if not isinstance(self.top_p, (int, float)) or not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"request {self.id!r}: top_p must be in (0, 1]; given {self.top_p!r}")
        if self.scope not in get_args(Scope):
            raise BudgetError(f"unknown budget scope {self.scope!r}; write one of {', '.join(get_args(Scope))}")
        for name, least, most in _COUNTS:
            value = getattr(self, name)
            if value is None and name == "max_answer_tokens":
                continue
            whole = _whole(value)
            if whole is None or not least <= whole <= most:
                raise ConfigError(
                    f"request {self.id!r}: {name} must be a whole number from {least} to {most}; given {value!r}"
                )
            self._set(name, whole)

    def _set(self, name: str, value: object) -> None:
        """Frozen to everybody else: what was given, as plain Python numbers."""
        object.__setattr__(self, name, value)


MIN_TEMPERATURE: Final = 1e-4  # below it logits / temperature leave the range of float32
MAX_SAMPLES: Final = 4096
_COUNTS: Final = (
    ("top_k", 0, 2**31 - 1), ("n", 1, MAX_SAMPLES), ("spent", 0, 2**31 - 1), ("grant", 0, 2**31 - 1),
    ("max_answer_tokens", 1, 2**31 - 1), ("seed", -(2**63), 2**64 - 1),
)  # fmt: skip


def _whole(value: object) -> int | None:
    """A whole number as an int (numpy's too), None for anything else, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


@dataclass(frozen=True)
class Chunk:
    """One token as it is decoded: which sample of which request, where it stands and who chose it."""

    id: str
    sample: int
    token: int
    role: Role
    region: Region


@dataclass(frozen=True)
class Trace:
    """One finished sample of one request.

    ids, roles, logprobs: everything behind the prompt, one entry per token; `logprobs` holds the log-prob of a
    sampled token at its sampling temperature and truncation (greedy: at temperature 1) and 0.0 for a forced one.
    resumed: the first so many think tokens came with the request (`think_prefix`). Their role is "sampled", because a
    model chose them and they count, but they were not scored in this run: their log-prob 0.0 is a placeholder.
    think_span, answer_span: [start, end) in `ids`, strictly inside the tags.
    stop: why the block closed. finish: why the answer ended; "length" = cut by its cap.
    forced: tokens forced inside the block and to close it. taps, site -> [L, C] float32 array: only when asked for;
    boundaries: (think tokens used, [L, C]) per node boundary. Neither goes to JSON.
    running: (think tokens used, remaining tokens estimated, confidence or None) at the boundaries that were read.
    granted: tokens that an extra grant added; `budget_effective` includes them.
    """

    id: str
    sample: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    roles: tuple[Role, ...]
    logprobs: tuple[float, ...]
    think_span: tuple[int, int]
    answer_span: tuple[int, int]
    plan: str
    plan_source: Source
    stop: StopCause
    finish: Finish
    budget_requested: int | Literal["predicted"] | None
    budget_effective: int
    budget_source: Source
    used: int
    forced: int
    scope: str = "turn"
    think: str = ""
    answer: str = ""
    answer_tokens: int = 0
    plan_probs: Mapping[str, float] | None = None
    budget_predicted: float | None = None
    budget_clipped: int | None = None
    confidence_before: float | None = None
    confidence_after: float | None = None
    confidence_before_raw: float | None = None
    confidence_after_raw: float | None = None
    calibrated: bool = False
    resumed: int = 0
    running: tuple[tuple[int, float, float | None], ...] = ()
    granted: int = 0
    taps: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    boundaries: Sequence[tuple[int, Any]] | None = field(default=None, compare=False, repr=False)

    @property
    def closed_naturally(self) -> bool:
        """The model closed the block itself; otherwise its length is censored."""
        return self.stop == "natural"

    @property
    def answered(self) -> bool:
        """A non-empty answer that was not cut."""
        return self.finish in ("end", "eos") and self.answer_tokens > 0

    @property
    def overshoot(self) -> int:
        """Think tokens above the effective budget; 0 always, or the controller is broken."""
        return max(0, self.used - self.budget_effective)

    @property
    def think_ids(self) -> tuple[int, ...]:
        return self.ids[self.think_span[0] : self.think_span[1]]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.ids[self.answer_span[0] : self.answer_span[1]]

    @property
    def answer_logprob(self) -> float | None:
        """Length-normalised log-prob of the answer (its end tag included), None when nothing was sampled."""
        start = self.answer_span[0]
        values = [p for p, role in zip(self.logprobs[start:], self.roles[start:], strict=True) if role == "sampled"]
        return sum(values) / len(values) if values else None

    def report(self) -> dict[str, Any]:
        """The schema of decisions.md §4, used by the CLI and on the wire.

        `stop` is the cause of the close of the block, or `limit` / `user` where the answer was cut after it.
        """
        stop = self.stop
        if stop == "natural" and self.finish in ("length", "user"):
            stop = "limit" if self.finish == "length" else "user"
        return {
            "plan": self.plan,
            "confidence": {
                "before": self.confidence_before,
                "after": self.confidence_after,
                "calibrated": self.calibrated,
            },
            "budget": {
                "requested": self.budget_requested,
                "predicted": self.budget_predicted,
                "effective": self.budget_effective,
                "used": self.used,
                "forced": self.forced,
                "source": self.budget_source,
                "scope": self.scope,
            },
            "answer_tokens": self.answer_tokens,
            "stop": stop,
        }

    def to_json(self) -> str:
        """One line of JSON with a version; taps and boundaries are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSAVED}
        return json.dumps({"version": VERSION, **values}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str, number: int = 1) -> Trace:
        """The Trace of one JSONL line. Raises DataError naming the line `number` and what is wrong."""
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"trace {number} is not JSON: {error}") from None
        if not isinstance(values, dict) or "version" not in values:
            raise DataError(f'trace {number} has no "version"; it was not written by gnomon')
        version = values.pop("version")
        if not isinstance(version, int) or version > VERSION:
            raise DataError(f"trace {number} has version {version!r}, this gnomon reads up to {VERSION}; update gnomon")
        known = {f.name: f for f in fields(cls) if f.name not in _UNSAVED}
        missing = [name for name in _REQUIRED if name not in values]
        unknown_keys = sorted(set(values) - set(known))
        if missing or unknown_keys:
            raise DataError(f"trace {number}: missing {missing or 'nothing'}, unknown {unknown_keys or 'nothing'}")
        for name in _TUPLES:
            values[name] = tuple(values[name])
        values["running"] = tuple(map(tuple, values.get("running", ())))
        trace = cls(**values)
        trace.check(number)
        return trace

    def check(self, number: int = 1) -> None:
        """Raise DataError where the parts disagree."""
        n = len(self.ids)
        if len(self.roles) != n or len(self.logprobs) != n:
            raise DataError(f"trace {number}: {n} ids, {len(self.roles)} roles, {len(self.logprobs)} log-probs")
        for name in ("think_span", "answer_span"):
            span = getattr(self, name)
            if len(span) != 2 or not 0 <= span[0] <= span[1] <= n:
                raise DataError(f"trace {number}: {name} {span!r} does not lie in {n} ids")
        if self.stop not in get_args(StopCause):
            raise DataError(f"trace {number}: stop {self.stop!r} is none of {', '.join(get_args(StopCause))}")


_UNSAVED: Final = frozenset({"taps", "boundaries"})
_TUPLES: Final = ("prompt_ids", "ids", "roles", "logprobs", "think_span", "answer_span")
_REQUIRED: Final = (
    "id", "sample", *_TUPLES, "plan", "plan_source", "stop", "finish", "budget_requested", "budget_effective",
    "budget_source", "used", "forced",
)  # fmt: skip


def dump_traces(traces: Sequence[Trace]) -> str:
    """Traces -> JSONL."""
    return "".join(trace.to_json() + "\n" for trace in traces)


def load_traces(text: str) -> list[Trace]:
    """JSONL -> Traces; empty lines are skipped. Raises DataError naming the line."""
    # Only "\n" ends a line: U+2028 and friends are legal inside JSON strings.
    return [Trace.from_json(line, i) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
