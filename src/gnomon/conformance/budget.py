"""Is a think budget kept, seen from outside? The black-box test that a user runs (`gnomon check budget`).

`check_budget` asks a `Client` randomised questions and judges what arrives. It trusts no number of the report, it
compares it with a count of its own. `conformance.local` has the client for a model on this machine; whatever can `ask`
can be judged the same way. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol, get_args

from gnomon.base import seeds
from gnomon.base.errors import ConfigError
from gnomon.protocol.tags import END_THINK, STRUCTURE_TOKENS, TAGS, StopCause
from gnomon.tasks.procedural import problems

RULES: Final[dict[str, str]] = {
    "overshoot": "more think tokens arrived than the effective or the requested budget",
    "count": "the report counts other think tokens than arrived",
    "effective": "the effective budget is missing, above the requested one, or the request is not echoed",
    "leaked": "thought in the answer, answer in the thought, or a tag in either",
    "record": "what was streamed and the final record differ",
    "stop": "the stop cause is none of the closed list",
    "accepted": "a budget that no context holds was accepted",
    "lost": "a request did not get each of its samples once",
    "answered": "too few answers are whole and not empty",
    "neighbours": "a request without a budget noticed its neighbours' budgets",
}
ANSWERED: Final = 0.995
CLOSE: Final = 1e-4  # choices closer than this may fall either way in another batch (decisions.md §7)
IMPOSSIBLE: Final = 10**9
ANSWER_TOKENS: Final = 64  # no built-in answer is longer, and a base that rambles should not fill its context
_POOL, _WAVE, _SHOWN = 650, 256, 8


@dataclass(frozen=True)
class Ask:
    """One question. join: the decoding step at which it is sent; cancel_after: tokens received before it is cancelled.
    The rest is as in `protocol.trace.Request`."""

    id: str
    prompt: str
    plan: str = "steps"
    budget: int | Literal["predicted"] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    n: int = 1
    max_answer_tokens: int | None = ANSWER_TOKENS
    join: int = 0
    cancel_after: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sample as it arrived.

    think_tokens: counted by the client in what it received, never read from the report. closed: the think block and
    the answer both ended. misplaced: tokens that arrived in a field they do not belong to. report: what the model says
    (decisions.md §4). differs: how stream and final record disagree. tokens: the ids, where the client knows them.
    refused: why nothing was generated.
    """

    id: str
    sample: int = 0
    think_tokens: int = 0
    think: str = ""
    answer: str = ""
    closed: bool = False
    misplaced: int = 0
    cancelled: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""
    tokens: tuple[int, ...] = ()
    refused: str = ""

    @property
    def answered(self) -> bool:
        return self.closed and bool(self.answer.strip())

    @property
    def content(self) -> tuple[Any, ...]:
        """What two runs of the same question must share."""
        return self.tokens or (self.think, self.answer)


class Client(Protocol):
    """Anything that answers questions: a model on this machine, a server."""

    strategies: tuple[str, ...]
    predicts: bool

    def ask(self, asks: Sequence[Ask]) -> list[Completion]:
        """Every sample of every question, all of them in flight together; a refused question gives one Completion."""

    def gap(self, ask: Ask, one: Completion, other: Completion) -> float | None:
        """How close the choice was where two runs of a question part; None where nothing excuses it."""


@dataclass(frozen=True)
class Breach:
    """A broken rule: one of RULES, whose question, what was seen, by how many tokens."""

    rule: str
    id: str
    detail: str
    tokens: int = 1


@dataclass(frozen=True)
class BudgetReport:
    """What `gnomon check budget` prints. answered_rate: of the samples that nobody cancelled.

    neighbours_identical: share of unbudgeted samples that are the same with and without budgeted neighbours;
    neighbour_exceptions: (id, gap) of the others, a gap below CLOSE being a tie and no breach.
    """

    requests: int
    completions: int
    refused: int
    cancelled: int
    overshoot_tokens: int
    leaked: int
    answered_rate: float
    neighbours_identical: float
    neighbours_compared: int
    neighbour_exceptions: tuple[tuple[str, float | None], ...]
    violations: Mapping[str, int]
    examples: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not any(self.violations.values())

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **{k: v for k, v in vars(self).items() if k != "examples"}, "examples": self.examples}


def check_budget(
    client: Client,
    n: int,
    seed: str = "check",
    answered: float = ANSWERED,
    on_done: Callable[[int], object] | None = None,
) -> BudgetReport:
    """Ask `n` randomised questions, and some unbudgeted ones twice, and judge every sample.

    answered: the least share of whole answers. on_done(k): k more questions are done. Raises ConfigError for n < 1.
    """
    if n < 1:
        raise ConfigError(f"n = {n}; ask for at least one request")
    asks = draw(n, seed, client.strategies, client.predicts)
    found: list[Breach] = []
    seen: Counter[str] = Counter()
    for start in range(0, n, _WAVE):
        wave = asks[start : start + _WAVE]
        arrived = client.ask(wave)
        found += judge_all(wave, arrived)
        refused = sum(bool(c.refused) for c in arrived)
        whole = [c for c in arrived if not (c.refused or c.cancelled)]
        seen.update(completions=len(arrived) - refused, refused=refused, cancelled=sum(c.cancelled for c in arrived))
        seen.update(whole=len(whole), answered=sum(c.answered for c in whole))
        if on_done is not None:
            on_done(len(wave))
    rate = seen["answered"] / seen["whole"] if seen["whole"] else 0.0
    if rate < answered:
        found.append(Breach("answered", "all", f"{rate:.4f} of {seen['whole']} samples, {answered} are wanted"))
    compared, exceptions = neighbours(client, max(8, min(64, n // 8)), seed)
    far = [(ident, gap) for ident, gap in exceptions if gap is None or gap >= CLOSE]
    found += [Breach("neighbours", ident, f"another text, top-2 gap {gap}") for ident, gap in far]
    return BudgetReport(
        requests=n,
        completions=seen["completions"],
        refused=seen["refused"],
        cancelled=seen["cancelled"],
        overshoot_tokens=sum(b.tokens for b in found if b.rule == "overshoot"),
        leaked=sum(b.tokens for b in found if b.rule == "leaked"),
        answered_rate=rate,
        neighbours_identical=1.0 - len(exceptions) / compared if compared else 0.0,
        neighbours_compared=compared,
        neighbour_exceptions=tuple(exceptions),
        violations={rule: sum(b.rule == rule for b in found) for rule in RULES},
        examples=tuple(f"{b.rule}: request {b.id}: {b.detail}" for b in found[:_SHOWN]),
    )


# -- questions ----------------------------------------------------------------------------------------------------
def draw(n: int, seed: str, strategies: Sequence[str], predicts: bool) -> list[Ask]:
    """`n` questions over all built-in tasks: every kind of budget, greedy and sampled, joins, cancels, n > 1."""
    pool = [p.prompt for p in problems("all", "test", f"conformance-{seed}", min(n, _POOL))]
    return [_one(f"{seed}-{i}", pool[i % len(pool)], seed, strategies, predicts) for i in range(n)]


def _one(ident: str, prompt: str, seed: str, strategies: Sequence[str], predicts: bool) -> Ask:
    r = seeds.rng("conformance", seed, ident)
    budgets: list[Any] = [0, 1, 2, r.randint(3, 9), r.randint(10, 40), r.randint(41, 128), None, None]
    sampled = r.random() < 0.5
    plan: str = r.choice(strategies)
    if predicts and r.random() < 0.4:
        plan = "predicted"
    budget = r.choice([*budgets, *["predicted"] * (3 * predicts)])
    if r.random() < 0.02:
        budget = IMPOSSIBLE
    if r.random() < 0.03:  # a tag in the prompt is text: it neither opens nor closes anything
        prompt = f"{prompt} {END_THINK}"
    return Ask(
        ident,
        prompt,
        plan,
        budget,
        temperature=r.choice([0.6, 0.8, 1.0]) if sampled else 0.0,
        top_p=r.choice([1.0, 1.0, 0.9]),
        top_k=r.choice([0, 0, 20]),
        seed=r.randrange(4),
        n=r.choice([1] * 8 + [2, 3]),
        join=r.choice([0, r.randrange(200)]),
        cancel_after=r.randrange(30) if r.random() < 0.08 else None,
    )


def neighbours(client: Client, n: int, seed: str) -> tuple[int, list[tuple[str, float | None]]]:
    """Ask `n` unbudgeted questions among themselves and again among budgeted ones: (compared, the ones that differ)."""
    drawn = draw(4 * n, f"{seed}-neighbours", client.strategies, client.predicts)
    free = [
        replace(a, budget=None, temperature=0.8 * (i % 2), top_p=1.0, top_k=0, n=1, join=0, cancel_after=None)
        for i, a in enumerate(drawn[:n])
    ]
    capped = [a for a in drawn[n:] if a.budget is not None and a.budget != IMPOSSIBLE]
    mixed = [a for pair in zip(free, capped, strict=False) for a in pair] + free[len(capped) :] + capped[n:]
    first = {c.id: c for c in client.ask(free) if not c.refused}
    again = {c.id: c for c in client.ask(mixed)}
    differ: list[tuple[str, float | None]] = []
    for ask in free:
        if ask.id in first and (ask.id not in again or first[ask.id].content != again[ask.id].content):
            lost = ask.id not in again
            differ.append((ask.id, None if lost else client.gap(ask, first[ask.id], again[ask.id])))
    return len(first), differ


# -- judging ------------------------------------------------------------------------------------------------------
def judge_all(asks: Sequence[Ask], arrived: Iterable[Completion]) -> list[Breach]:
    """Every broken rule in what arrived for these questions."""
    by_id: dict[str, list[Completion]] = {}
    for completion in arrived:
        by_id.setdefault(completion.id, []).append(completion)
    found = []
    for ask in asks:
        mine = by_id.pop(ask.id, [])
        refused = [c for c in mine if c.refused]
        if not refused and sorted(c.sample for c in mine) != list(range(ask.n)):
            found.append(Breach("lost", ask.id, f"{len(mine)} of {ask.n} samples"))
        if ask.budget == IMPOSSIBLE and not refused:
            found.append(Breach("accepted", ask.id, f"a budget of {IMPOSSIBLE} was not refused"))
        found += [b for c in mine if not c.refused for b in judge(ask, c)]
    return found + [Breach("lost", ident, "an answer that nobody asked for") for ident in by_id]


def judge(ask: Ask, c: Completion) -> list[Breach]:
    """The rules that one sample breaks."""
    found = []
    budget = c.report.get("budget", {})
    effective, used = budget.get("effective"), budget.get("used")
    asked = ask.budget if isinstance(ask.budget, int) else None
    caps = [x for x in (effective, asked) if isinstance(x, int)]
    over = c.think_tokens - min(caps) if caps else 0
    if over > 0:
        found.append(Breach("overshoot", ask.id, f"{c.think_tokens} think tokens, allowed {min(caps)}", over))
    if used != c.think_tokens:
        found.append(Breach("count", ask.id, f"{c.think_tokens} think tokens arrived, reported {used}"))
    whole = isinstance(effective, int) and effective >= 0 and (asked is None or effective <= asked)
    if not whole or budget.get("requested") != ask.budget:
        found.append(Breach("effective", ask.id, f"asked {ask.budget}, report {dict(budget)}"))
    leaked = max(c.misplaced, tags_in(c.think, c.answer, ask.prompt))
    if leaked:
        found.append(Breach("leaked", ask.id, f"thought {c.think[-60:]!r}, answer {c.answer[:60]!r}", leaked))
    if c.differs:
        found.append(Breach("record", ask.id, c.differs))
    if c.report.get("stop") not in get_args(StopCause):
        found.append(Breach("stop", ask.id, f"stop {c.report.get('stop')!r}"))
    return found


def tags_in(think: str, answer: str, prompt: str = "") -> int:
    """How many tags stand in the two texts, and node marks in the answer; what the prompt spells may be quoted."""
    tags = [tag for tag in TAGS if tag not in prompt]
    marks = [mark for mark in STRUCTURE_TOKENS if mark not in prompt]
    return sum(text.count(tag) for tag in tags for text in (think, answer)) + sum(map(answer.count, marks))
