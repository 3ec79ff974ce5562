"""The batched engine: every sampler, trainer, evaluator and chat decodes here, and the budget rule holds for all.

Legend: B rows · T new tokens · S cached slots · L blocks · C channels · V vocabulary.

One request: prefill (left-padded; equal prompts share it) -> plan at the last prompt token -> forced plan and think
tag -> budget and confidence at the think tag -> think under the controller -> end tag, its own or forced -> confidence
after -> forced answer tag -> answer until its end tag, an end of sequence or its cap. Forced tokens go through the
model like any other. Finished rows are compacted away. Rows share arithmetic, never state or randomness.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gnomon.base.errors import ConfigError, GnomonError
from gnomon.decoding import sampling
from gnomon.decoding.ragged import common_prefix, left_pad
from gnomon.decoding.room import Room, allot, check_prefix
from gnomon.decoding.row import AfterChoice, BudgetChoice, Decode, Row, Sink
from gnomon.model.backbone import Backbone
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request, Trace

_SLOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PROMPT_BUCKET = 16


class PlanChoice(Protocol):
    """What the metacognitive layer says at the last prompt token."""

    @property
    def plan(self) -> str: ...
    @property
    def probs(self) -> dict[str, float]: ...


class Metacog(Protocol):
    """The decisions the engine asks for (gnomon.metacognition.decide.Decider). Taps are float32 [B, L, C]."""

    def plan(self, taps: Tensor) -> Sequence[PlanChoice]:
        """At the last prompt token, one per row."""

    def budget(
        self, taps: Tensor, plans: Sequence[str], predicted_plans: Sequence[str] | None = None
    ) -> Sequence[BudgetChoice]:
        """At the think tag, one per row."""

    def after(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> Sequence[AfterChoice]:
        """At the end tag, one per row."""


class Engine:
    """Decodes requests in batches of at most `max_batch` rows.

    decode: ids -> text for the traces (None leaves texts empty). max_think: bound on thinking where a request names no
    number (None or "predicted"); an explicit budget is only bound by the context.
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: Layout,
        metacog: Metacog | None = None,
        max_batch: int = 32,
        decode: Decode | None = None,
        max_think: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be ≥ 1; given {max_batch}")
        self.backbone, self.layout, self.metacog = backbone, layout, metacog
        self.max_batch, self.decode, self.max_think = max_batch, decode, max_think
        self._cancelled: set[str] = set()
        self._masked = tuple(sorted(layout.masked(True))), tuple(sorted(layout.masked(False)))
        tags = (layout.think, layout.end_think, *layout.end_think_also)
        self._long_tags = any(len(tag) > 1 for tag in tags)

    def check(self, request: Request) -> Room:
        """Whether `request` can be kept; raises BudgetError with the numbers, or ConfigError."""
        predicted = request.plan == "predicted" or request.budget == "predicted"
        if predicted and self.metacog is None:
            raise ConfigError(
                f"request {request.id!r} asks for a predicted plan or budget, but this model has no trained heads; "
                "name a plan and a budget (a number or none)"
            )
        if request.plan != "predicted":
            self.layout.plan_ids(request.plan)
        budget = request.budget if isinstance(request.budget, int) else None
        room = allot(
            self.backbone.context, len(request.prompt_ids), self.layout.overhead, budget, request.max_answer_tokens
        )
        if self.max_think is not None and budget is None:
            room = Room(min(room.limit, self.max_think), room.reserve, room.overhead)
        if request.think_prefix:
            check_prefix(request.think_prefix, room.limit if budget is None else budget, self.layout)
        return room

    def cancel(self, request_id: str) -> None:
        """Stop this request at its next token; its traces say `user`. For use from a sink or another thread."""
        self._cancelled.add(request_id)

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
        """Traces in the order of the requests, n for each.

        record_taps: keep the states at "prompt", "think" and "end"; record_boundaries: also at node boundaries.
        sink: called for every token; on_trace: for every finished trace. refused: collects requests that cannot be
        kept, by id, and decodes the rest; without it the first one raises before anything is decoded.
        """
        rows: list[Row] = []
        for request in requests:
            try:
                room = self.check(request)
            except GnomonError as error:
                if refused is None:
                    raise type(error)(f"request {request.id!r}: {error}") from None
                refused[request.id] = error
                continue
            for sample in range(request.n):
                key = sampling.stream_key(request.seed, request.id, sample)
                rows.append(Row(request, sample, key, len(rows), self.layout, room))
        done: dict[int, Trace] = {}

        def finish(row: Row) -> None:
            trace = done[row.order] = row.trace(self.decode, record_taps)
            if on_trace is not None:
                on_trace(trace)

        first: dict[tuple[int, ...], int] = {}
        for row in rows:
            row.sink = sink
            first.setdefault(row.request.prompt_ids, row.order)
        rows.sort(key=lambda r: (_bucket(r), r.upper, first[r.request.prompt_ids], r.order))
        with torch.inference_mode():
            for start in range(0, len(rows), self.max_batch):
                wave = _Wave(self, rows[start : start + self.max_batch], record_taps, record_boundaries, finish)
                wave.run()
        self._cancelled.clear()
        return [done[i] for i in range(len(rows))]


class _Wave:
    """Rows that are decoded together, from prefill to the last answer."""

    def __init__(
        self, engine: Engine, rows: list[Row], taps: bool, boundaries: bool, finish: Callable[[Row], None]
    ) -> None:
        self.engine, self.rows, self.record, self.boundaries, self.finish = engine, rows, taps, boundaries, finish
        self.device = engine.backbone.device
        self.reads = taps or engine.metacog is not None
        self.bans_stale = True
        self.bans: tuple[Tensor, Tensor] | None = None

    def run(self) -> None:
        """Prefill, decide, decode."""
        self._prefill()
        logits = self._open()
        settings = sampling.params(
            [r.request.temperature for r in self.rows],
            [r.request.top_k for r in self.rows],
            [r.request.top_p for r in self.rows],
            [r.key for r in self.rows],
            self.device,
        )
        step = 0
        while True:
            self._ban(logits)
            steps = np.array([step + len(r.request.think_prefix) for r in self.rows], dtype=np.uint64)
            ids, logprobs = sampling.sample(logits, settings, steps)
            tokens = self._take(ids.tolist(), logprobs.tolist())
            live = [i for i, row in enumerate(self.rows) if row.finish is None]
            if not live:
                return
            if _slots(len(live)) < len(self.rows):
                keep = self._keep(live)
                tokens, settings = [tokens[i] for i in keep], settings.take(keep)
            logits = self._feed(tokens)
            step += 1

    def _prefill(self) -> None:
        """Unique prompts through the model, plans, then one cache row per sample."""
        rows, layout = self.rows, self.engine.layout
        unique = {row.request.prompt_ids: None for row in rows}
        index = {prompt: i for i, prompt in enumerate(unique)}
        width = max(map(_bucket, rows))
        # Padding takes slots of the cache, never positions.
        tail = max(row.upper + row.max_answer for row in rows) + layout.overhead
        tail += max(len(row.request.think_prefix) for row in rows)
        prefix = max(len(ids) for ids in layout.plans.values()) + len(layout.think)
        prompts, shared = list(unique), common_prefix(list(unique))
        capacity = width + prefix + tail
        self.cache = self.engine.backbone.new_cache(1 if shared else len(unique), capacity)
        self.mask = torch.zeros((len(unique), capacity), dtype=torch.bool, device=self.device)
        if shared:  # the instruction and examples of a foreign base: once for all rows
            head = torch.tensor([prompts[0][:shared]], device=self.device)
            self.engine.backbone.step(head, torch.ones_like(head, dtype=torch.bool), self.cache, logits="none")
            self.cache.select(torch.zeros(len(unique), dtype=torch.int64, device=self.device))
            self.mask[:, :shared] = True
        ids, real = left_pad([p[shared:] for p in prompts], layout.pad, width - shared)
        self.mask[:, shared:width] = real.to(self.device)
        out = self.engine.backbone.step(
            ids.to(self.device), self.mask[:, :width], self.cache, logits="none", want_taps=self.reads
        )
        self.length = width
        at = [index[row.request.prompt_ids] for row in rows]
        choices = (
            self.engine.metacog.plan(out.taps) if self.engine.metacog is not None and out.taps is not None else None
        )
        arrays = _arrays(out.taps) if self.record else None
        for row, i in zip(rows, at, strict=True):
            if choices is not None:
                row.wished, row.plan_probs = choices[i].plan, dict(choices[i].probs)
                if row.request.plan == "predicted":
                    row.plan = row.wished
            if arrays is not None:
                row.taps["prompt"] = arrays[i]
        if at != list(range(len(unique))):
            self._select(at)

    def _open(self) -> Tensor:
        """Plan and think tag through the model, then budgets. Returns logits [B, V]."""
        rows, engine = self.rows, self.engine
        prefixes = [row.prefix() for row in rows]
        width = max(map(len, prefixes))
        ids, real = left_pad(prefixes, engine.layout.pad, width)
        self.mask[:, self.length : self.length + width] = real.to(self.device)
        self.length += width
        out = engine.backbone.step(
            ids.to(self.device), self.mask[:, : self.length], self.cache, logits="last", want_taps=self.reads
        )
        choices: Sequence[BudgetChoice | None] = [None] * len(rows)
        if engine.metacog is not None and out.taps is not None:
            choices = engine.metacog.budget(out.taps, [r.plan for r in rows], [r.wished for r in rows])
        arrays = _arrays(out.taps) if self.record else None
        for i, row in enumerate(rows):
            row.begin(choices[i])
            if arrays is not None:
                row.taps["think"] = arrays[i]
        assert out.logits is not None
        return self._resume(out.logits)

    def _resume(self, logits: Tensor) -> Tensor:
        """Think tokens of earlier runs through the model, behind the think tag where predictions are read."""
        prefixes = [row.request.think_prefix for row in self.rows]
        width = max(map(len, prefixes))
        if width == 0:
            return logits
        ids, real = left_pad(prefixes, self.engine.layout.pad, width, empty=True)
        self.mask[:, self.length : self.length + width] = real.to(self.device)
        self.length += width
        out = self.engine.backbone.step(ids.to(self.device), self.mask[:, : self.length], self.cache, logits="last")
        assert out.logits is not None
        return torch.where(real[:, -1:].to(self.device), out.logits, logits)

    def _take(self, choices: list[int], logprobs: list[float]) -> list[int]:
        """Let every row take its token; a finished one becomes padding."""
        cancelled = self.engine._cancelled
        tokens = [self.engine.layout.pad] * len(choices)
        for i, row in enumerate(self.rows):
            if row.finish is not None:
                continue
            if cancelled and row.request.id in cancelled:
                row.cancel()
            else:
                answering = row.in_answer
                token = row.take(choices[i], logprobs[i])
                if row.in_answer != answering:
                    self.bans_stale = True
            if row.finish is None:
                tokens[i] = token
            else:
                self.finish(row)
        return tokens

    def _feed(self, tokens: list[int]) -> Tensor:
        """One position for every slot; reads states only where a row stands at a site."""
        live = [row.finish is None for row in self.rows]
        sites = [
            i
            for i, row in enumerate(self.rows)
            if live[i] and ((row.tapped == "end" and self.reads) or (row.tapped == "boundary" and self.boundaries))
        ]
        self.mask[:, self.length] = True if all(live) else torch.tensor(live, device=self.device)
        self.length += 1
        out = self.engine.backbone.step(
            torch.tensor(tokens, dtype=torch.int64, device=self.device)[:, None],
            self.mask[:, : self.length],
            self.cache,
            logits="last",
            want_taps=bool(sites),
        )
        if sites:
            self._read(sites, out.taps[sites])  # type: ignore[index]
        assert out.logits is not None
        return out.logits

    def _read(self, sites: list[int], taps: Tensor) -> None:
        """taps [sites, L, C] of the rows that stand at an end tag or a node boundary."""
        ends = [(n, self.rows[i]) for n, i in enumerate(sites) if self.rows[i].tapped == "end"]
        if self.record or self.boundaries:
            for i, array in zip(sites, _arrays(taps), strict=True):
                row = self.rows[i]
                if row.tapped == "boundary":
                    row.boundaries.append((row.state.used, array))
                elif self.record:
                    row.taps["end"] = array
        metacog = self.engine.metacog
        if metacog is None or not ends:
            return
        known = [r.before is not None and r.before.calibrated and r.at_prediction for _, r in ends]
        after = metacog.after(
            taps[[n for n, _ in ends]], [r.plan for _, r in ends], [r.state.used for _, r in ends], known
        )
        for (_, row), choice in zip(ends, after, strict=True):
            row.after = choice

    def _ban(self, logits: Tensor) -> None:
        """Set ids that may not be sampled to -inf, in place."""
        if self.bans_stale:
            pairs = [(i, token) for i, row in enumerate(self.rows) for token in self.engine._masked[row.in_answer]]
            self.bans = self._pairs(pairs)
            self.bans_stale = False
        if self.bans is not None:
            logits.index_put_(self.bans, logits.new_tensor(-torch.inf))
        if self.engine._long_tags:
            answering = [(i, row) for i, row in enumerate(self.rows) if row.in_answer and row.finish is None]
            extra = self._pairs([(i, token) for i, row in answering for token in row.state.banned(reopen=False)])
            if extra is not None:
                logits.index_put_(extra, logits.new_tensor(-torch.inf))

    def _pairs(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | None:
        if not pairs:
            return None
        at, token = torch.tensor(pairs, dtype=torch.int64, device=self.device).T
        return at, token

    def _keep(self, live: list[int]) -> list[int]:
        """Compact to the live rows, filled up to a bucket with finished ones; returns the kept slots."""
        gone = [i for i in range(len(self.rows)) if self.rows[i].finish is not None]
        keep = sorted(live + gone[: _slots(len(live)) - len(live)])
        self.rows = [self.rows[i] for i in keep]
        self._select(keep)
        self.bans_stale = True
        return keep

    def _select(self, rows: list[int]) -> None:
        at = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.cache.select(at)
        self.mask = self.mask[at]


def _bucket(row: Row) -> int:
    """The padded length of the row's prompt."""
    return -(-len(row.request.prompt_ids) // _PROMPT_BUCKET) * _PROMPT_BUCKET


def _slots(rows: int) -> int:
    """The smallest slot bucket that holds `rows`."""
    at = bisect.bisect_left(_SLOTS, rows)
    return _SLOTS[at] if at < len(_SLOTS) else rows


def _arrays(taps: Tensor | None) -> Any:
    """[B, L, C] on any device -> a list of float32 arrays [L, C] that own their memory."""
    assert taps is not None, "the backbone was asked for taps and gave none"
    return [row.copy() for row in taps.detach().float().cpu().numpy()]
