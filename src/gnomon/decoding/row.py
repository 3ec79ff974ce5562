"""One sample of one request while it is decoded. Everything about it lives here, nothing in a batch position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gnomon.decoding.budget import BudgetState
from gnomon.decoding.budget_config import BudgetConfig
from gnomon.decoding.choices import AfterChoice, BudgetChoice, RunningChoice
from gnomon.decoding.room import Room
from gnomon.decoding.slack import SoftRule
from gnomon.metacognition.policy import Sampling, settings
from gnomon.protocol.layout import Layout
from gnomon.protocol.match import matcher
from gnomon.protocol.tags import Role
from gnomon.protocol.trace import Chunk, Finish, Region, Request, Source, Trace

Decode = Callable[[Sequence[int]], str]
Sink = Callable[[Chunk], None]


def left(request: Request) -> int | None:
    """What is left of the number that was asked for, None where none was."""
    return max(0, request.budget - request.spent) if isinstance(request.budget, int) else None


class Row:
    """The running record. The engine calls `begin`, then `take` once per step until `finish` is set."""

    __slots__ = (
        "_answer_rule",
        "_answer_state",
        "_eos",
        "_seldom",
        "_stray_rules",
        "_stray_state",
        "after",
        "answer_end",
        "answer_start",
        "before",
        "boundaries",
        "cancelled",
        "effective",
        "finish",
        "ids",
        "in_answer",
        "inside",
        "key",
        "layout",
        "logprobs",
        "max_answer",
        "order",
        "plan",
        "plan_probs",
        "policy",
        "prefix_inside",
        "queue",
        "read_next",
        "request",
        "roles",
        "room",
        "rules",
        "running",
        "sample",
        "sink",
        "source",
        "state",
        "sure",
        "tapped",
        "taps",
        "think_end",
        "think_start",
        "watched",
        "weighs",
        "wished",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        sample: int,
        key: int,
        order: int,
        layout: Layout,
        room: Room,
        rules: Sequence[SoftRule] = (),
    ) -> None:
        self.request, self.sample, self.key, self.order, self.rules = request, sample, key, order, rules
        self.layout, self.room = layout, room
        self.max_answer = room.reserve if request.max_answer_tokens is None else request.max_answer_tokens
        self.ids: list[int] = []
        self.roles: list[Role] = []
        self.logprobs: list[float] = []
        self.plan = self.wished = request.plan
        self.plan_probs: dict[str, float] | None = None
        self.state: BudgetState
        self.before: BudgetChoice | None = None
        self.after: AfterChoice | None = None
        self.source: Source = "requested"
        self.effective = 0
        self.queue: tuple[int, ...] = ()  # ids that the engine forces next, first one first
        self.in_answer = False
        self.inside = False  # the last token stands strictly inside the thought, and in no begun end tag
        self.prefix_inside: list[bool] = []
        self.policy: Sampling | None = None
        self.finish: Finish | None = None
        self.cancelled = False  # set from outside; takes effect at the next token
        self.think_start = self.think_end = self.answer_start = self.answer_end = 0
        self.taps: dict[str, Any] = {}
        self.boundaries: list[tuple[int, Any]] = []
        self.running: list[tuple[int, float, float | None]] = []
        self.read_next = 0  # think tokens from which on a boundary is read again
        self.watched = any(rule.wants_confidence for rule in rules)  # every boundary is read
        self.weighs = any(rule.wants_margin for rule in rules)  # its rules look at the logits
        self._seldom = all(rule.wants_confidence and not rule.wants_margin for rule in rules)
        self.sure = math.nan  # confidence read at the last token, NaN where none was
        self.tapped = ""  # the site whose state is wanted when the present token is fed
        self.sink: Sink | None = None
        self._answer_rule = matcher(layout.end_answer)
        self._answer_state = 0
        # Tags of several tokens that must not be completed in a thought, or in the answer; single ids are masked.
        stray = ([t for t in tags if len(t) > 1] for tags in ((layout.answer, layout.end_answer), (layout.answer,)))
        self._stray_rules = [matcher(*tags) if tags else None for tags in stray]
        self._stray_state = 0
        self._eos = frozenset(layout.eos)

    @property
    def asks(self) -> bool:
        """Whether a rule has something to look at here: those that want a confidence alone only where one was read."""
        return not (self._seldom and math.isnan(self.sure))

    @property
    def promise(self) -> float:
        """What the layer said before thinking of the whole thought, NaN where that is unknown."""
        promised = None if self.before is None else self.before.promised
        return math.nan if promised is None else promised

    @property
    def upper(self) -> int:
        """Think tokens at most, known before any prediction."""
        asked = left(self.request)
        return self.room.limit if asked is None else min(asked, self.room.limit)

    @property
    def need(self) -> int:
        """Positions at most: prompt, tags, thinking and answer."""
        thought = max(self.upper, len(self.request.think_prefix))
        return len(self.request.prompt_ids) + self.room.overhead + thought + self.max_answer

    @property
    def at_prediction(self) -> bool:
        """Whether the cap is the clipped prediction itself, the only point that the card was fitted for."""
        before = self.before
        if before is None or self.source != "predicted" or self.effective != before.clipped:
            return False
        return self.state.cause not in ("confidence", "slack", "loop")

    def begin(self, before: BudgetChoice | None) -> None:
        """The block is open: settle the budget. effective = min(requested, clip(predicted), limit).

        A prediction below what was thought before (`think_prefix`) closes the block next, at that number.
        """
        request, limit, asked = self.request, self.room.limit, left(self.request)
        predicted = None
        if before is not None and request.budget is not None and (asked is None or request.use_prediction):
            predicted = max(before.clipped, len(request.think_prefix))
        self.source = "requested"
        if predicted is not None and (asked is None or predicted <= asked):
            self.source = "predicted"
        layout = self.layout
        self.state = BudgetState(
            BudgetConfig(
                think=layout.think,
                end=layout.end_think,
                budget=asked,
                predicted=predicted,
                limit=limit,
                scope=request.scope,
                transition=layout.transition,
                eos=layout.eos,
                end_also=layout.end_think_also,
            )
        )
        given = [n for n in (asked, predicted) if n is not None]
        if not given or min(given) > limit:
            self.source = "limit"
        self.effective = min([*given, limit])
        self.before = before
        for token in layout.think:
            self.state.advance(token, "forced")
        self.think_start = len(self.ids)
        for token in request.think_prefix:
            self._append(token, 0.0, "sampled", "think")
            self.state.advance(token, "prefilled")
            self.prefix_inside.append(self.state.open and not self.state.held)
        if self.plan in layout.empty_plans:
            self.state.close_now()

    def prefix(self) -> tuple[int, ...]:
        """Plan and think tag, appended as forced."""
        plan = self.layout.plan_ids(self.plan)
        for token in plan:
            self._append(token, 0.0, "forced", "plan")
        for token in self.layout.think:
            self._append(token, 0.0, "forced", "tag")
        return plan + self.layout.think

    def take(self, choice: int, logprob: float) -> int:
        """The model chose `choice` here; returns the token that is fed next. Sets `finish` when nothing follows."""
        self.tapped = ""
        self.sure = math.nan
        self.inside = False
        if self.queue:
            token, self.queue = self.queue[0], self.queue[1:]
            self._append(token, 0.0, "forced", "tag")
            self.state.advance(token, "forced")
            if not self.queue:
                self.answer_start = self.answer_end = len(self.ids)
            return token
        if not self.in_answer:
            return self._think(choice, logprob)
        self._answer(choice, logprob)
        return choice

    def note(self, choice: RunningChoice) -> None:
        """A boundary was read: kept for the record and for the rules that ask."""
        self.running.append((self.state.used, choice.remaining, choice.confidence))
        self.sure = math.nan if choice.confidence is None else choice.confidence

    def estimate(self, choice: RunningChoice) -> None:
        """The cap may fall to what is still needed here, or rise once by the grant.

        A grant asks whether the whole thought may fail: what was promised of it, where the layer's confidence here is
        that of closing here (low until the answer is there), else the confidence here.
        """
        state, request = self.state, self.request
        need = state.used + choice.upper
        whole = choice.confidence if math.isnan(self.promise) else self.promise
        doubtful = whole is not None and whole < request.grant_below
        if doubtful and request.grant and state.cap is not None and need > state.cap:
            if state.grant(request.grant, self.room.limit):
                self.effective += state.granted
        elif request.budget is not None and request.use_prediction:
            state.lower_cap(need, "confidence")

    def heat(self) -> tuple[float, float]:
        """Temperature and top-p mass of the next token: the policy's inside the thought, the request's elsewhere."""
        return settings(self.policy, self.request.temperature, self.request.top_p, thinking=not self.in_answer)

    @property
    def drawn(self) -> int:
        """Positions behind the think tag so far: the counter of this row's random stream."""
        return len(self.ids) - self.think_start

    def abandon(self) -> None:
        """The user left before the row was begun: nothing is decided, nothing was thought."""
        self.plan = "" if self.plan == "predicted" else self.plan
        self.request = replace(self.request, think_prefix=())
        self.begin(None)
        self.cancel()

    def cancel(self) -> None:
        """The user left."""
        if self.state.open:
            self.state.cancel()
            self.think_end = self.answer_start = self.answer_end = len(self.ids)
        self.finish = "user"

    def at_boundary(self, best: int) -> bool:
        """Whether the block could end here without cutting a node: `best` is the model's first choice.

        A KIND token begins a node, so the place in front of it is the boundary; a newline ends one, so behind it.
        """
        if self.layout.atomic_nodes:
            return best in self.layout.boundary or best == self.state.tag_next
        return self.tapped == "boundary"

    def stray(self) -> tuple[int, ...]:
        """Ids that would complete a tag of several tokens that has no place here."""
        rule = self._stray_rules[self.in_answer]
        ids: tuple[int, ...] = rule.enders[self._stray_state] if rule is not None else ()  # type: ignore[assignment]
        return ids + self.state.banned(reopen=False) if self.in_answer else ids

    def _append(self, token: int, logprob: float, role: Role, region: Region) -> None:
        self.ids.append(token)
        self.roles.append(role)
        self.logprobs.append(logprob)
        rule = self._stray_rules[region == "answer"]
        if rule is not None:
            self._stray_state = rule.step(self._stray_state, token) if region in ("think", "answer") else 0
        if self.sink is not None:
            self.sink(Chunk(self.request.id, self.sample, token, role, region))

    def _think(self, choice: int, logprob: float) -> int:
        state = self.state
        if state.plain(choice):
            self._append(choice, logprob, "sampled", "think")
            self.inside = True
            if choice in self.layout.boundary:
                self.tapped = "boundary"
            return choice
        kind, token = state.next(choice)
        state.advance(token)
        if kind == "continue":
            self._append(token, logprob, "sampled", "think")
            self.inside = state.open and not state.held
            if token in self.layout.boundary:
                self.tapped = "boundary"
        else:
            self._append(token, 0.0, "forced", "think")
        if state.phase == "closed":
            self.think_end = len(self.ids) - state.tag_length
            self.in_answer, self._stray_state = True, 0
            self.queue = self.layout.answer
            self.tapped = "end"
            self.answer_start = self.answer_end = len(self.ids)
        return token

    def _answer(self, choice: int, logprob: float) -> None:
        if choice in self._eos:
            self._append(choice, logprob, "sampled", "tag")
            self.finish = "eos"
            return
        rule = self._answer_rule
        state = self._answer_state = rule.step(self._answer_state, choice)
        hit = rule.hit[state]
        if hit is None and len(self.ids) + 1 - self.answer_start - rule.depth[state] > self.max_answer:
            # A begun end tag was let through to be completed; left again, it stays in the answer, as in the stream, so
            # that an answer may pass its cap by the length of that tag minus one.
            self.finish = "length"
            return
        self._append(choice, logprob, "sampled", "answer")
        self.state.advance(choice)
        self.answer_end = len(self.ids)
        if hit is not None:
            self.answer_end -= hit[1]
            self.finish = "end"

    def trace(self, decode: Decode | None, record_taps: bool) -> Trace:
        """The finished record."""
        request, state = self.request, self.state
        assert self.finish is not None
        think = tuple(self.ids[self.think_start : self.think_end])
        answer = tuple(self.ids[self.answer_start : self.answer_end])
        before, after = self.before, self.after
        calibrated = before is not None and before.calibrated and self.at_prediction
        calibrated = calibrated and (after is None or after.calibrated)
        return Trace(
            id=request.id,
            sample=self.sample,
            prompt_ids=request.prompt_ids,
            ids=tuple(self.ids),
            roles=tuple(self.roles),
            logprobs=tuple(self.logprobs),
            think_span=(self.think_start, self.think_end),
            answer_span=(self.answer_start, self.answer_end),
            plan=self.plan,
            plan_source="predicted" if request.plan == "predicted" else "requested",
            stop=state.cause or "user",
            finish=self.finish,
            budget_requested=request.budget,
            budget_effective=self.effective,
            budget_source=self.source,
            used=state.used,
            forced=state.forced,
            scope=request.scope,
            think=decode(think).strip() if decode is not None else "",
            answer=decode(answer).strip() if decode is not None else "",
            answer_tokens=len(answer),
            plan_probs=self.plan_probs,
            budget_predicted=None if before is None else before.predicted,
            budget_clipped=None if before is None else before.clipped,
            confidence_before=before.confidence if before is not None and self.at_prediction else None,
            confidence_after=after.confidence if after is not None else None,
            confidence_before_raw=None if before is None else before.raw,
            confidence_after_raw=None if after is None else after.raw,
            calibrated=calibrated,
            resumed=len(request.think_prefix),
            taps=self.taps if record_taps else None,
            boundaries=self.boundaries or None,
            running=tuple(self.running),
            granted=state.granted,
        )
