"""The budget inside plain `model.generate` of transformers: a logits processor and a stopping criterion.

Every row of the batch is a `Row` with the engine's own controller; nothing is counted here. `generate` draws a token
only after the processors have spoken, so that the controller cannot wait for the draw where what follows depends on it:
inside the block when the cap is used up or the best token ends the sequence, and in the answer at its cap. There the
model's best token counts as its choice, and one token is left to draw. Everywhere else the draw is free and the row
takes what came. Greedy decoding is therefore the engine's, token for token; sampling keeps the same caps, with these
choices greedy and no end of sequence drawn inside a block.
Legend: B rows (prompts times samples) · T positions of the padded prompts · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from gnomon.base.errors import ConfigError, ModelError, TagError
from gnomon.decoding.budget import BudgetState
from gnomon.decoding.budget_config import BudgetConfig
from gnomon.decoding.room import Room, allot, check_prefix
from gnomon.decoding.row import Decode, Row
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request, Trace

Ids = tuple[int, ...]
_BEAMS = (
    "beam search and assisted decoding move rows about and cannot keep a budget: call generate with num_beams=1, and "
    "for several samples give samples=k here and num_return_sequences=k there"
)


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as `generate` wants them: ids int64 [B, T] with `pad` at the left, attention mask int64 [B, T]."""
    width = max(map(len, prompts), default=0)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


@dataclass(frozen=True)
class _Prompt:
    """A prompt taken apart: what stands before plan and think tag, and the think tokens behind an open one."""

    head: Ids
    layout: Layout
    plan: str
    opened: bool
    thought: Ids = ()


def _read(prompt: Ids, layout: Layout, plan: str) -> _Prompt:
    """An unclosed block at the end of `prompt` belongs to this turn; older blocks change nothing."""
    state = BudgetState(BudgetConfig(layout.think, layout.end_think, end_also=layout.end_think_also))
    state.prefill(prompt)
    if not state.open:
        layout.plan_ids(plan)
        return _Prompt(prompt, layout, plan, opened=False)
    thought = len(prompt) - state.used - state.held
    head = prompt[: thought - len(layout.think)]
    named = [name for name, ids in layout.plans.items() if ids and head[-len(ids) :] == ids]
    if named:
        plan = max(named, key=lambda name: len(layout.plans[name]))
        head = head[: -len(layout.plans[plan])]
    else:  # a template opened the block without a plan of ours
        layout.plan_ids(plan)
        layout = replace(layout, plans={plan: ()}, empty_plans=frozenset())
    return _Prompt(head, layout, plan, opened=True, thought=prompt[thought:])


@dataclass(frozen=True)
class _Step:
    """What was decided in front of a token. logp, given [B, V]: log-probs of the masked scores, and the scores that
    were handed on; best: (token, log-prob) per row; only: the one token that may follow, None where the draw is free.
    """

    logp: Tensor
    given: Tensor
    best: list[tuple[int, float]]
    only: list[int | None]


class BudgetLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Keeps a think budget for every row of one `generate` call; give it to `BudgetStoppingCriteria` too.

    input_ids, attention_mask int64 [B, T]: what `generate` gets, padded at the left. A prompt that ends in the think
    tag, or in a begun thought, is resumed; behind any other one plan and think tag are forced.
    budgets: think tokens at most, one number or one per prompt, None = what the context leaves. plans: a strategy, or
    one per prompt. context: positions that the model knows; padding takes some, as it does in the model's cache.
    max_answer_tokens: cap of an answer (default: the reserve). max_think: bound where there is no budget. samples: rows
    per prompt, `num_return_sequences` of the call. One processor serves one call.
    Raises BudgetError with the numbers where a budget cannot be kept, ConfigError for right padding.
    """

    def __init__(
        self,
        layout: Layout,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        context: int,
        budgets: int | Sequence[int | None] | None,
        plans: str | Sequence[str] = "steps",
        max_answer_tokens: int | None = None,
        max_think: int | None = None,
        samples: int = 1,
    ) -> None:
        prompts = _prompts(input_ids, attention_mask)
        caps = _each("budgets", budgets, len(prompts))
        names = _each("plans", plans, len(prompts))
        if samples < 1:
            raise ConfigError(f"samples = {samples}; give at least 1")
        self.layout, self._expected = layout, input_ids.repeat_interleave(samples, 0)
        self._rows: list[Row] = []
        self._todo: list[Ids] = []  # plan and think tag, still to be forced
        width = input_ids.shape[1]
        for i, prompt in enumerate(prompts):
            read = _read(prompt, layout, names[i])
            request = Request(
                f"row {i}", read.head, plan=read.plan, budget=caps[i], max_answer_tokens=max_answer_tokens,
                think_prefix=read.thought,
            )  # fmt: skip
            room = _room(request, read, context, width - len(prompt) + len(read.head), max_think)
            for sample in range(samples):
                row = Row(request, sample, 0, len(self._rows), read.layout, room)
                prefix = row.prefix()
                row.begin(None)
                self._rows.append(row)
                self._todo.append(() if read.opened else prefix)
        given = [0 if todo else len(row.ids) for row, todo in zip(self._rows, self._todo, strict=True)]
        needs = [row.need - len(row.request.prompt_ids) for row in self._rows]
        self.max_new_tokens = 1 + max(need - n for need, n in zip(needs, given, strict=True))
        """What to give `generate` as max_new_tokens, so that its own limit cuts nobody."""
        self._masks: Tensor | None = None  # [2, V], added to logits: think, answer
        self._seen = 0  # positions that the rows have taken
        self._last: Tensor | None = None  # [B] the newest of them
        self._step: _Step | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [B, T + step], scores [B, V] -> scores of the tokens that may follow, -inf elsewhere."""
        self._sync(input_ids)
        rows = self._rows
        asked = [i for i, row in enumerate(rows) if row.finish is None and not self._todo[i] and not row.queue]
        phase = torch.tensor([row.in_answer for row in rows], dtype=torch.int64, device=scores.device)
        masked = scores.float() + self._mask(scores).index_select(0, phase)
        _forbid(masked, [(i, token) for i in asked for token in rows[i].stray()])
        logp = masked.log_softmax(-1)
        top = logp.max(-1)
        best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self._check_numbers(asked, best)
        only = [self._only(i, best[i][0]) for i in range(len(rows))]
        given = masked.clone()
        thinking = [i for i in asked if only[i] is None and not rows[i].in_answer]
        _forbid(given, [(i, token) for i in thinking for token in self.layout.eos])
        if forced := [(i, token) for i, token in enumerate(only) if token is not None]:
            at, tokens = torch.tensor(forced, device=given.device).T
            given[at] = -torch.inf
            given[at, tokens] = 0.0
        self._step = _Step(logp, given, best, only)
        return given

    def finished(self, input_ids: Tensor) -> Tensor:
        """bool [B]: rows whose answer has ended, after the newest token of input_ids."""
        if self._last is None or (self._step is None and input_ids.shape[1] > self._seen):
            raise ConfigError("the stopping criterion runs without its processor; give `generate` both of them")
        self._sync(input_ids)
        return torch.tensor([row.finish is not None for row in self._rows], device=input_ids.device)

    def traces(self, decode: Decode | None = None) -> list[Trace]:
        """What happened to every row, in the engine's record; call it behind `generate`.

        Log-probs are those at temperature 1. A row that `generate` ended by its own limit has finish "length" and,
        where its block was open, stop "limit"; one that another criterion ended has finish "user".
        """
        return [row.trace(decode, False) if row.finish is not None else _cut(row, decode) for row in self._rows]

    # -- one step -----------------------------------------------------------------------------------------------
    def _only(self, i: int, choice: int) -> int | None:
        """The one token that may follow in row i, None where whatever is drawn stands. choice: the best token."""
        row = self._rows[i]
        if row.finish is not None:
            return self.layout.pad
        if self._todo[i]:
            return self._todo[i][0]
        return _next(row, choice, self.layout.pad) if row.queue or _waits(row, choice) else None

    def _sync(self, input_ids: Tensor) -> None:
        """Let every row take the token that has followed; only the newest two columns are looked at."""
        if self._last is None:
            self._start(input_ids)
            return
        rows, length = input_ids.shape
        if rows != len(self._rows) or length not in (self._seen, self._seen + 1):
            raise ConfigError(
                f"generate went from {self._seen} positions in {len(self._rows)} rows to {length} in {rows}; a "
                f"processor serves one call, so make a new one for the next; {_BEAMS}"
            )
        if not torch.equal(input_ids[:, self._seen - 1], self._last):
            raise ConfigError(f"the rows have changed places since the last token; {_BEAMS}")
        if length == self._seen:
            return
        assert self._step is not None
        newest = input_ids[:, -1]
        self._take(newest.tolist(), newest[:, None], self._step)
        self._seen, self._last, self._step = length, newest.clone(), None

    def _take(self, tokens: list[int], column: Tensor, step: _Step) -> None:
        """tokens: what was drawn, column int64 [B, 1]: the same."""
        logp, given = (scores.gather(1, column.to(scores.device))[:, 0].tolist() for scores in (step.logp, step.given))
        first = self._seen == self._expected.shape[1]
        for i, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            if row.finish is not None:
                continue
            if given[i] == -torch.inf:
                if first or token != self.layout.pad:
                    raise ConfigError(
                        f"row {i} got token {token}, which may not follow here. Another logits processor behind this "
                        f"one, an end id of the generation config that is none of the layout's {self.layout.eos}, or "
                        f"a padding id other than {self.layout.pad} can do that; {_BEAMS}"
                    )
                row.cancel()  # another criterion has ended this row
            elif self._todo[i]:
                self._todo[i] = self._todo[i][1:]
            elif step.only[i] is not None:
                row.take(*step.best[i])
            else:
                row.take(token, logp[i])

    def _start(self, input_ids: Tensor) -> None:
        """The first call: `generate` must bring the prompts that the rows were made for."""
        if input_ids.shape != self._expected.shape or not torch.equal(input_ids, self._expected.to(input_ids.device)):
            raise ConfigError(
                f"generate brings prompts of the shape {list(input_ids.shape)}, the processor was made for "
                f"{list(self._expected.shape)} (samples included), or for other ids: give both the same; {_BEAMS}"
            )
        self._seen, self._last = input_ids.shape[1], input_ids[:, -1].clone()

    def _mask(self, scores: Tensor) -> Tensor:
        """[2, V]: what is never sampled in a thought, and in an answer."""
        if self._masks is None:
            ids = [sorted(self.layout.masked(inside)) for inside in (True, False)]
            vocab = scores.shape[1]
            tags = (self.layout.think, self.layout.end_think, self.layout.answer, self.layout.end_answer)
            highest = max(map(max, filter(None, (*ids, *tags, self.layout.eos))))
            if highest >= vocab:
                raise TagError(f"the layout names id {highest}, but the model gives scores for {vocab} ids only")
            self._masks = torch.zeros((2, vocab), device=scores.device)
            for row, banned in enumerate(ids):
                self._masks[row, banned] = -torch.inf
        return self._masks

    def _check_numbers(self, asked: list[int], best: list[tuple[int, float]]) -> None:
        bad = [i for i in asked if not math.isfinite(best[i][1])]
        if bad:
            raise ModelError(
                f"the model gives no finite log-probability for row {bad[0]} ({len(bad)} rows): its weights or states "
                "hold NaN or infinity, or every token is masked"
            )


class BudgetStoppingCriteria(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a `BudgetLogitsProcessor` behind its answer."""

    def __init__(self, processor: BudgetLogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """bool [B]: True where nothing follows."""
        return self.processor.finished(input_ids)


def _waits(row: Row, best: int) -> bool:
    """Whether what follows depends on the choice, so that it must be made now."""
    if row.in_answer:
        return len(row.ids) + 1 - row.answer_start > row.max_answer
    state = row.state
    if not state.needs_choice or best in row.layout.eos:
        return True
    return state.left is not None and state.held >= state.left


def _next(row: Row, choice: int, pad: int) -> int:
    """The token that `row.take(choice)` would give; the row stays as it is. Seldom asked: at caps and tags."""
    other = _copy(row)
    token = other.take(choice, 0.0)
    return pad if other.finish == "length" else token


def _copy(row: Row) -> Row:
    other = copy(row)
    other.ids, other.roles, other.logprobs = list(row.ids), list(row.roles), list(row.logprobs)
    other.state = row.state.clone()
    return other


def _cut(row: Row, decode: Decode | None) -> Trace:
    """The record of a row that has not finished."""
    other = _copy(row)
    other.cancel()
    trace = other.trace(decode, False)
    return replace(trace, finish="length", stop="limit" if trace.stop == "user" else trace.stop)


def _forbid(scores: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """-inf at (row, token), in place."""
    if pairs:
        at, token = torch.tensor(pairs, device=scores.device).T
        scores.index_put_((at, token), scores.new_tensor(-torch.inf))


def _each(name: str, given: Any, rows: int) -> list[Any]:
    """One value per prompt."""
    if given is None or isinstance(given, (int, str)):
        found = [given] * rows
    else:
        found = list(given)
    if len(found) != rows:
        raise ConfigError(f"{name} has {len(found)} values for {rows} prompts; give one for each, or one for all")
    if "predicted" in found:
        raise ConfigError(
            f'{name} = "predicted" needs the metacognitive layer, which `generate` does not run; ask `Reasoner.ask`, '
            "or give a number (a strategy's name)"
        )
    return found


def _prompts(ids: Tensor, mask: Tensor | None) -> list[Ids]:
    """The rows of ids [B, T] without their padding. Raises ConfigError unless it stands at the left."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise ConfigError(f"input_ids must be [rows, positions], at least one of each; given {list(ids.shape)}")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ConfigError(f"attention_mask {list(mask.shape)} and input_ids {list(ids.shape)} differ in shape")
    real = mask.bool()
    if bool((real[:, :-1] & ~real[:, 1:]).any()) or not bool(real[:, -1].all()):
        raise ConfigError("prompts must be padded at the left: set tokenizer.padding_side = 'left', or use left_padded")
    rows = zip(ids.tolist(), real.sum(-1).tolist(), strict=True)
    return [tuple(row[len(row) - n :]) for row, n in rows]


def _room(request: Request, read: _Prompt, context: int, before: int, max_think: int | None) -> Room:
    """Checked as the engine does. before: positions in front of plan and think tag, padding included."""
    budget = request.budget
    assert not isinstance(budget, str)
    room = allot(context, before, read.layout.overhead, budget, request.max_answer_tokens)
    if max_think is not None and budget is None:
        room = Room(min(room.limit, max_think), room.reserve, room.overhead)
    check_prefix(read.thought, room.limit if budget is None else budget, read.layout)
    return room
