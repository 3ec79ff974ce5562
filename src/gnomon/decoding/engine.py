"""The engine: every sampler, trainer, evaluator and chat decodes here, and the budget rule holds for all.

Requests are checked here and decoded by a `Session` (continuous batching, see session.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gnomon.base.errors import ConfigError, GnomonError
from gnomon.decoding.budget_config import BudgetConfig
from gnomon.decoding.choices import AfterChoice, BudgetChoice, RunningChoice
from gnomon.decoding.room import Room, allot, check_prefix
from gnomon.decoding.row import Decode, Row, Sink, left
from gnomon.decoding.session import Session
from gnomon.decoding.slack import Rules
from gnomon.metacognition.policy import Sampling
from gnomon.model.backbone import Backbone
from gnomon.model.steering import Steering
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request, Trace


class PlanChoice(Protocol):
    """What the metacognitive layer says at the last prompt token."""

    @property
    def plan(self) -> str: ...
    @property
    def probs(self) -> dict[str, float]: ...


class Metacog(Protocol):
    """The decisions the engine asks for (gnomon.metacognition.decide.Decider). Taps are float32 [B, L, C]."""

    @property
    def reads_boundaries(self) -> bool:
        """Whether `running` may be asked."""

    @property
    def closes(self) -> bool:
        """Whether its confidence at boundaries is that of closing there."""

    @property
    def steering(self) -> Steering | None:
        """What the layer does to the base inside thoughts, None where it only reads."""

    @property
    def modulates(self) -> bool:
        """Whether `policy` knows more than "as asked for"."""

    def policy(self, taps: Tensor, plans: Sequence[str]) -> Sequence[Sampling | None]:
        """At the think tag, one per row: how to sample inside the thought; None = as asked for."""

    def plan(self, taps: Tensor) -> Sequence[PlanChoice]:
        """At the last prompt token, one per row."""

    def budget(
        self, taps: Tensor, plans: Sequence[str], predicted_plans: Sequence[str] | None = None
    ) -> Sequence[BudgetChoice]:
        """At the think tag, one per row."""

    def reached(
        self, taps: Tensor, ends: Sequence[bool], plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool]
    ) -> Sequence[AfterChoice | RunningChoice]:
        """At the end tag where ends [B] says so, else at a boundary between nodes; one per row."""


class Engine:
    """Decodes requests in batches of at most `max_batch` rows.

    decode: ids -> text for the traces (None leaves texts empty). max_think: bound on thinking where a request names no
    number (None or "predicted"); an explicit budget is only bound by the context. rules: soft rules for every sample
    (decoding.slack.factory); they may bring the close nearer, nothing else. running: let the layer estimate again at
    boundaries, where it has learned to, at most once in `running_every` think tokens; it may close sooner than
    predicted, at a point that no card was fitted for. modulate: sample thoughts as the layer's decoding policy says,
    where it has learned one.
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: Layout,
        metacog: Metacog | None = None,
        max_batch: int = 32,
        decode: Decode | None = None,
        max_think: int | None = None,
        rules: Rules | None = None,
        running: bool = False,
        running_every: int = 16,
        modulate: bool = False,
    ) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be ≥ 1; given {max_batch}")
        self.backbone, self.layout, self.metacog = backbone, layout, metacog
        self.max_batch, self.decode, self.max_think = max_batch, decode, max_think
        self.rules, self.running_every = rules, running_every
        self.running = running and metacog is not None and metacog.reads_boundaries
        self.modulate = modulate and metacog is not None and metacog.modulates
        steering = None if metacog is None else metacog.steering
        self.steering = None if steering is None else steering.on(backbone.device)
        tags = (layout.think, layout.end_think, layout.answer, layout.end_answer, *layout.end_think_also)
        self.long_tags = any(len(tag) > 1 for tag in tags)
        self.masks = torch.zeros((2, backbone.vocab_size), device=backbone.device)  # added to logits: think, answer
        for row, inside in enumerate((True, False)):
            self.masks[row, sorted(layout.masked(inside))] = -torch.inf
        self._running: set[Session] = set()
        BudgetConfig(  # tags and transition that contradict each other are refused here, not at the first token
            think=layout.think, end=layout.end_think, transition=layout.transition, eos=layout.eos,
            end_also=layout.end_think_also,
        )  # fmt: skip

    def check(self, request: Request) -> Room:
        """Whether `request` can be kept; raises BudgetError with the numbers, or ConfigError.

        A budget that spans several requests (scope tool_loop, session) may be larger than this one has room for.
        """
        for name in ("prompt_ids", "think_prefix"):
            stray = [i for i in getattr(request, name) if not 0 <= i < self.backbone.vocab_size]
            if stray:
                raise ConfigError(f"{name} holds id {stray[0]}, but the vocabulary has {self.backbone.vocab_size} ids")
        predicted = request.plan == "predicted" or request.budget == "predicted"
        if predicted and self.metacog is None:
            raise ConfigError(
                "it asks for a predicted plan or budget, but this model has no trained heads; name a plan and a budget "
                "(a number or none)"
            )
        if request.plan != "predicted":
            self.layout.plan_ids(request.plan)
        asked = left(request)
        here = asked if request.scope in ("block", "turn") else None
        room = allot(
            self.backbone.context, len(request.prompt_ids), self.layout.overhead, here, request.max_answer_tokens
        )
        if self.max_think is not None and asked is None:
            room = Room(min(room.limit, self.max_think), room.reserve, room.overhead)
        if request.think_prefix:
            check_prefix(request.think_prefix, room.limit if asked is None else min(asked, room.limit), self.layout)
        return room

    def session(
        self,
        *,
        record_taps: bool = False,
        record_boundaries: bool = False,
        sink: Sink | None = None,
        on_trace: Callable[[Trace], None] | None = None,
    ) -> Session:
        """A batch that requests can join at any step: `submit`, `step` until it says False, `cancel`.

        record_taps: keep the states at "prompt", "think" and "end"; record_boundaries: also at node boundaries.
        sink: called for every token; on_trace: for every finished trace.
        """
        return Session(
            self, record_taps, record_boundaries, sink, None if on_trace is None else lambda _, trace: on_trace(trace)
        )

    def cancel(self, request_id: str) -> None:
        """Stop this request of every present `run` at its next token; its traces say `user`."""
        for session in list(self._running):
            session.cancel(request_id)

    def run(
        self,
        requests: Sequence[Request],
        *,
        record_taps: bool = False,
        record_boundaries: bool = False,
        sink: Sink | None = None,
        on_trace: Callable[[Trace], None] | None = None,
        refused: dict[str, GnomonError] | None = None,
    ) -> list[Trace]:
        """Traces in the order of the requests, n for each; the options are those of `session`.

        refused: collects requests that cannot be kept, by id, and decodes the rest; without it the first one raises
        before anything is decoded.
        """
        done: dict[int, Trace] = {}

        def keep(row: Row, trace: Trace) -> None:
            done[row.order] = trace
            if on_trace is not None:
                on_trace(trace)

        session = Session(self, record_taps, record_boundaries, sink, keep)
        rows: list[Row] = []
        for request in requests:
            try:
                rows += session.rows_of(request)
            except GnomonError as error:
                if refused is None:
                    raise type(error)(f"request {request.id!r}: {error}") from None
                refused[request.id] = error
        first: dict[tuple[int, ...], int] = {}
        for row in rows:
            first.setdefault(row.request.prompt_ids, row.order)
        # The longest first, so that no long row is left alone at the end; equal prompts together, they share a pass.
        session.queue(sorted(rows, key=lambda r: (-r.upper, first[r.request.prompt_ids], r.order)))
        self._running.add(session)
        try:
            while session.step():
                pass
        finally:
            self._running.discard(session)
        return [done[row.order] for row in rows]
