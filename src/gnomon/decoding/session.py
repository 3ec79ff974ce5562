"""Continuous batching: rows join and leave at any step, so that short thoughts never wait for long ones.

Legend: R live rows · V vocabulary · L blocks · C channels.

A row's life: its prompt goes into a slot (equal prompts once, a long common beginning once) -> plan at the last prompt
token -> plan and think tag -> budget and confidence at the think tag -> thinking under the controller -> end tag, its
own or forced -> confidence after -> answer tag -> answer until its end tag, an end of sequence or its cap. Live rows
stand in the slots 0..R-1; the last row moves into a slot that becomes free. Forced tokens go through the model like any
other. Rows share arithmetic, never state or randomness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gnomon.base.errors import ConfigError, ModelError
from gnomon.decoding import sampling, soften
from gnomon.decoding.choices import BudgetChoice
from gnomon.decoding.prefix import AGAIN_LEAST, common_prefix
from gnomon.decoding.row import Row, Sink
from gnomon.decoding.rows import arrays, gates, joined, picked
from gnomon.model.slots import SlotCache
from gnomon.model.steering import Steer
from gnomon.protocol.trace import Request, Trace

if TYPE_CHECKING:
    from gnomon.decoding.engine import Engine

_JOIN_SHARE = 8  # new rows wait until an eighth of the slots is free: a pass over one prompt wastes the machine


class Session:
    """Rows that are decoded together. Not thread-safe, except `submit` and `cancel`."""

    def __init__(
        self,
        engine: Engine,
        record_taps: bool,
        record_boundaries: bool,
        sink: Sink | None,
        on_done: Callable[[Row, Trace], None] | None,
    ) -> None:
        self.engine, self.backbone, self.layout = engine, engine.backbone, engine.layout
        self.record, self.boundaries = record_taps, record_boundaries
        self.sink, self.on_done = sink, on_done
        self.reads = record_taps or engine.metacog is not None
        self.pending: deque[Row] = deque()
        self.rows: list[Row] = []
        self.cache: SlotCache | None = None
        self.logits: Tensor | None = None  # [R, V] in front of every live row's next token
        self._prefix: tuple[int, ...] = ()  # the common beginning held in the spare slot
        self._spare = -1
        self._settings: sampling.Params | None = None  # of the present rows, and their gate vectors [R, C]
        self._gates: Tensor | None = None
        self.steering = engine.steering
        self._ordered = 0
        self._present: dict[str, list[Row]] = {}  # rows that wait or are decoded, by request
        self._failed: BaseException | None = None

    # -- from outside -------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> None:
        """Queue every sample of a request. Raises BudgetError or ConfigError where it cannot be kept."""
        self.queue(self.rows_of(request))

    def rows_of(self, request: Request) -> list[Row]:
        """Fresh rows, in the order of submission, one per sample."""
        room = self.engine.check(request)
        found = []
        for sample in range(request.n):
            key = sampling.stream_key(request.seed, request.id, sample)
            rules = () if self.engine.rules is None else self.engine.rules(request)
            row = Row(request, sample, key, self._ordered, self.layout, room, rules)
            if row.watched and not (self.engine.metacog is not None and self.engine.metacog.closes):
                raise ConfigError(
                    "rule 'sure' needs a layer whose confidence at boundaries is that of closing there, and this model "
                    "has none; train one with `gnomon train metacog --trial-n 3000`, or use margin, slack or cut"
                )
            row.sink = self.sink
            self._ordered += 1
            found.append(row)
        return found

    def queue(self, rows: Sequence[Row]) -> None:
        """Rows that wait for a slot."""
        for row in rows:
            self._present.setdefault(row.request.id, []).append(row)
        self.pending.extend(rows)

    def cancel(self, request_id: str) -> None:
        """Stop the samples of this request that wait or are decoded, at their next token; their traces say `user`."""
        for row in list(self._present.get(request_id, ())):
            row.cancelled = True

    def step(self) -> bool:
        """Let rows join, choose one token for every live row, feed it. False when nothing is left.

        An exception (of a sink, of the model) leaves rows half taken: the session refuses to go on after one.
        """
        if self._failed is not None:
            raise ConfigError(
                f"this session was stopped by {type(self._failed).__name__}: {self._failed}; its rows are not in a "
                "known state. Open another session and submit again what has not come back."
            )
        try:
            with torch.inference_mode():
                return self._step()
        except BaseException as error:
            self._failed = error
            raise

    def _step(self) -> bool:
        self._join()
        if not self.rows:
            return False
        assert self.logits is not None
        if self.engine.long_tags:
            self._ban_completions(self.logits)
        leaning = soften.soften(self.rows, self.logits, self.engine.masks[0]) if self.engine.rules is not None else []
        steps = np.fromiter((r.drawn for r in self.rows), dtype=np.uint64, count=len(self.rows))
        phase = np.fromiter((r.in_answer for r in self.rows), dtype=np.int32, count=len(self.rows))
        found = sampling.sample(self.logits, self._sampling(), steps, self.engine.masks, phase)
        if not bool(torch.isfinite(found[1]).all()):
            self._no_numbers(found[1])
        ids, logprobs = found[0].tolist(), found[1].tolist()
        soften.settle(leaning, self.rows, ids, logprobs, self._sampling().temperature)
        tokens = self._take(ids, logprobs)
        self._leave(tokens)
        if self.rows:
            self._feed(tokens)
        return bool(self.rows or self.pending)

    # -- joining ------------------------------------------------------------------------------------------------
    def _join(self) -> None:
        most, free = self.engine.max_batch, self.engine.max_batch - len(self.rows)
        if not self.pending or not free:
            return
        if self.rows and free < min(len(self.pending), most // _JOIN_SHARE):
            return
        joiners = list(self._next(free))
        if not joiners:
            return
        first: dict[tuple[int, ...], Row] = {}
        for row in joiners:
            first.setdefault(row.request.prompt_ids, row)
        leaders = list(first.values())
        others = [row for row in joiners if row is not first[row.request.prompt_ids]]
        start = len(self.rows)
        self._room([*leaders, *others])
        self._prompts(leaders, others, start)
        logits = self._open([*leaders, *others], start)
        self.rows += [*leaders, *others]
        self.logits = logits if self.logits is None or not start else joined(self.logits, logits)
        self._settings = self._gates = None

    def _next(self, free: int) -> Iterator[Row]:
        """Up to `free` waiting rows; cancelled ones are finished here."""
        while self.pending and free:
            row = self.pending.popleft()
            if row.cancelled:
                row.abandon()
                self._finish(row)
                continue
            free -= 1
            yield row

    def _room(self, joiners: Sequence[Row]) -> None:
        """A cache with slots for the live rows, the joiners and a spare one, and capacity for the longest."""
        slots = min(self.engine.max_batch, len(self.rows) + len(joiners) + len(self.pending)) + 1
        need = max(row.need for row in joiners)
        if self.cache is None:
            self.cache, self._spare = self.backbone.new_cache(slots, need), slots - 1
        elif slots - 1 > self._spare or need > self.cache.capacity:
            slots = max(slots, self._spare + 1)
            self.cache = self.cache.resized(slots, max(need, self.cache.capacity))
            self._spare, self._prefix = slots - 1, ()
            self.cache.cut(self._spare)

    def _prompts(self, leaders: Sequence[Row], others: Sequence[Row], start: int) -> None:
        """Prompts into the slots from `start` on: leaders through the model, the others as copies; then plans."""
        assert self.cache is not None
        prompts = [row.request.prompt_ids for row in leaders]
        shared = self._share(prompts)
        for slot in range(start, start + len(leaders)):
            self.cache.cut(slot)
            if shared:
                self.cache.copy(self._spare, slot, shared)
        tails = [prompt[shared:] for prompt in prompts]
        out = self.backbone.extend(self.cache, tails, start, logits="none", taps=self.reads)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        for slot, row in enumerate(others, start + len(leaders)):
            self.cache.copy(start + place[row.request.prompt_ids], slot)
        metacog = self.engine.metacog
        choices = metacog.plan(out.taps) if metacog is not None and out.taps is not None else None
        states = arrays(out.taps) if self.record else None
        for row in (*leaders, *others):
            i = place[row.request.prompt_ids]
            if choices is not None:
                row.wished, row.plan_probs = choices[i].plan, dict(choices[i].probs)
                if row.request.plan == "predicted":
                    row.plan = row.wished
            if states is not None:
                row.taps["prompt"] = states[i]

    def _share(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Length of a common beginning that stands in the spare slot (instruction and examples of a foreign base)."""
        assert self.cache is not None
        held = common_prefix([(*self._prefix, -1), *prompts], AGAIN_LEAST) if self._prefix else 0
        if held:
            return held
        common = common_prefix(prompts)
        if len(prompts) == 1 and self.pending and self.pending[0].request.prompt_ids == prompts[0]:
            common = len(prompts[0]) - 1  # more samples of this prompt wait for a slot
            common = common if common >= AGAIN_LEAST else 0
        if not common:
            return 0
        self._prefix = prompts[0][:common]
        self.cache.cut(self._spare)
        self.backbone.extend(self.cache, [self._prefix], self._spare, logits="none")
        return common

    def _open(self, joiners: Sequence[Row], start: int) -> Tensor:
        """Plan and think tag through the model, then budgets. Returns logits [joiners, V]."""
        assert self.cache is not None
        metacog = self.engine.metacog
        prefixes = [row.prefix() for row in joiners]
        out = self.backbone.extend(self.cache, prefixes, start, taps=self.reads)
        choices: Sequence[BudgetChoice | None] = [None] * len(joiners)
        if metacog is not None and out.taps is not None:
            choices = metacog.budget(out.taps, [r.plan for r in joiners], [r.wished for r in joiners])
        states = arrays(out.taps) if self.record else None
        if self.engine.modulate and metacog is not None and out.taps is not None:
            for row, policy in zip(joiners, metacog.policy(out.taps, [r.plan for r in joiners]), strict=True):
                row.policy = policy
        for i, row in enumerate(joiners):
            row.begin(choices[i])
            if states is not None:
                row.taps["think"] = states[i]
        assert out.logits is not None
        return self._resume(joiners, start, out.logits)

    def _resume(self, joiners: Sequence[Row], start: int, logits: Tensor) -> Tensor:
        """Think tokens of earlier runs through the model, behind the think tag where predictions are read."""
        for resumed, run in groupby(enumerate(joiners), key=lambda pair: bool(pair[1].request.think_prefix)):
            if resumed:
                rows = list(run)
                first = rows[0][0]
                thoughts = [row.request.think_prefix for _, row in rows]
                steer = None
                if self.steering is not None:
                    inside = [row.prefix_inside for _, row in rows]
                    at = [i if within else -1 for i, flags in enumerate(inside) for within in flags]
                    steer = Steer(self.steering, gates([row for _, row in rows], self.steering), at)
                out = self.backbone.extend(self.cache, thoughts, start + first, steer=steer)
                assert out.logits is not None
                logits[first : first + len(rows)] = out.logits
        return logits

    # -- one step -----------------------------------------------------------------------------------------------
    def _sampling(self) -> sampling.Params:
        if self._settings is None:
            heat = [row.heat() for row in self.rows]
            self._settings = sampling.params(
                [temperature for temperature, _ in heat],
                [row.request.top_k for row in self.rows],
                [top_p for _, top_p in heat],
                [row.key for row in self.rows],
                self.backbone.device,
            )
        return self._settings

    def _ban_completions(self, logits: Tensor) -> None:
        """No row may complete a tag of several tokens that has no place where it stands: -inf, in place."""
        pairs = [(i, token) for i, row in enumerate(self.rows) for token in row.stray()]
        if pairs:
            at, token = torch.tensor(pairs, device=logits.device).T
            logits.index_put_((at, token), logits.new_tensor(-torch.inf))

    def _take(self, choices: list[int], logprobs: list[float]) -> list[int]:
        """Let every row take its token; -1 where it has finished."""
        tokens = []
        for row, choice, logprob in zip(self.rows, choices, logprobs, strict=True):
            if row.cancelled:
                row.cancel()
                tokens.append(-1)
                continue
            token = row.take(choice, logprob)
            if row.policy is not None and row.tapped == "end":
                self._settings = None  # its thought is over: the answer is sampled as asked
            tokens.append(token if row.finish is None else -1)
        return tokens

    def _leave(self, tokens: list[int]) -> None:
        """Finished rows go; the last row takes the place of each, so that live rows stay side by side."""
        if -1 not in tokens:
            return
        assert self.cache is not None
        for row in [row for row in self.rows if row.finish is not None]:
            self._finish(row)
        for slot in range(len(self.rows) - 1, -1, -1):
            if self.rows[slot].finish is None:
                continue
            last = len(self.rows) - 1
            if slot < last:
                self.cache.move(last, slot)
                self.rows[slot], tokens[slot] = self.rows[last], tokens[last]
            else:
                self.cache.cut(slot)
            self.rows.pop()
            tokens.pop()
        self._settings = self._gates = None

    def _finish(self, row: Row) -> None:
        mine = self._present[row.request.id]
        mine.remove(row)
        if not mine:
            del self._present[row.request.id]
        if self.on_done is not None:
            with torch.inference_mode(False):  # whoever gets the trace may train on it
                self.on_done(row, row.trace(self.engine.decode, self.record))

    def _no_numbers(self, logprobs: Tensor) -> None:
        """The model gave NaN or infinity: name the requests; nothing may be sampled from that."""
        bad = [self.rows[i].request.id for i in (~torch.isfinite(logprobs)).nonzero()[:, 0].tolist()]
        raise ModelError(
            f"the model gives no finite log-probability for {', '.join(map(repr, bad[:3]))} ({len(bad)} rows): "
            "its weights or states hold NaN or infinity"
        )

    def _feed(self, tokens: list[int]) -> None:
        """One position for every row; reads states only where a row stands at a site."""
        sites = [i for i, row in enumerate(self.rows) if row.tapped and self._wants(row)]
        steer = None
        if self.steering is not None:
            self._gates = gates(self.rows, self.steering) if self._gates is None else self._gates
            at = [i if row.inside else -1 for i, row in enumerate(self.rows)]
            steer = Steer(self.steering, self._gates, at)
        out = self.backbone.extend(self.cache, [(token,) for token in tokens], taps=sites, steer=steer)
        if sites:
            assert out.taps is not None
            self._read(sites, out.taps)
        self.logits = out.logits

    def _wants(self, row: Row) -> bool:
        if row.tapped == "end":
            return self.reads
        return self.boundaries or row.watched or self._due(row)

    def _due(self, row: Row) -> bool:
        """Whether the layer estimates again at this boundary."""
        return self.engine.running and row.state.used >= row.read_next

    def _read(self, sites: list[int], taps: Tensor) -> None:
        """taps [sites, L, C] of the rows that stand at an end tag or a node boundary."""
        rows = [self.rows[i] for i in sites]
        if self.record or self.boundaries:
            for row, array in zip(rows, arrays(taps), strict=True):
                if row.tapped == "end":
                    if self.record:
                        row.taps["end"] = array
                elif self.boundaries:
                    row.boundaries.append((row.state.used, array))
        metacog = self.engine.metacog
        if metacog is None:
            return
        if self.boundaries:  # some stand here for the record only
            asked = [n for n, row in enumerate(rows) if row.tapped == "end" or row.watched or self._due(row)]
            rows, taps = [rows[n] for n in asked], picked(taps, asked)
        if not rows:
            return
        ends = [row.tapped == "end" for row in rows]
        known = [
            row.before is not None
            and (row.before.calibrated and row.at_prediction if end else row.before.at_boundaries)
            for row, end in zip(rows, ends, strict=True)
        ]
        found = metacog.reached(taps, ends, [row.plan for row in rows], [row.state.used for row in rows], known)
        for row, end, choice in zip(rows, ends, found, strict=True):
            if end:
                row.after = choice  # type: ignore[assignment]
                continue
            row.note(choice)  # type: ignore[arg-type]
            if self._due(row):
                row.read_next = row.state.used + self.engine.running_every
                row.estimate(choice)  # type: ignore[arg-type]
