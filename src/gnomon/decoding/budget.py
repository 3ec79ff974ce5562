"""The budget controller: a pure state machine over token ids. No model, no text, O(1) per token.

States. idle: no block open yet. counting: inside a block. slack: inside a block under a cap that a soft rule lowered.
forcing: the rest of the end tag is being forced. closed: the block is closed, the answer runs.

Counting (budget-rules.md, decisions.md §5)
  * A think token is a token sampled (or prefilled) strictly between start tag and end tag. Tags, forced tokens and the
    tokens in `lead` (the newline of a template) are not counted; forced tokens are counted apart.
  * Budget B allows exactly B of them. With B used the model is still evaluated: if its own choice is the end tag the
    cause is `natural`, otherwise the close is forced and the cause is that of the cap. Where nothing is left when a
    block opens (B = 0, or a second block in a turn) it closes at once, cause `hard`.
  * The tokens of an end tag of several tokens are held while it is incomplete: they count as think tokens only once
    the model leaves the tag. If the cap would be broken by leaving it, the rest of the begun tag is forced instead.
    The held tokens then belong to the tag, so such a cut may show fewer than B used, never more.
  * A start tag inside an open block is an ordinary, counted token. An end-of-sequence token inside a block closes the
    block (the end tag is forced in its place) with cause `natural`: the model had finished of its own accord.
  * The cap only falls. The one exception is `grant`: once per request, bounded, never above request or limit.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from gnomon.base.errors import BudgetError
from gnomon.decoding.budget_config import BudgetConfig, check_budget
from gnomon.protocol.match import matcher
from gnomon.protocol.tags import StopCause

Phase = Literal["idle", "counting", "slack", "forcing", "closed"]
Origin = Literal["sampled", "prefilled", "forced", "tool"]
SoftCause = Literal["slack", "confidence", "loop", "user"]


class Action(NamedTuple):
    """What happens with the next position: the model's choice stands, another token is forced, or decoding stops."""

    kind: Literal["continue", "force", "stop"]
    token: int


class Mark(NamedTuple):
    """A point to rewind to (see `BudgetState.mark`)."""

    phase: Phase
    used: int
    total: int
    forced: int
    blocks: int
    cause: StopCause | None
    inner: tuple[Any, ...]


class BudgetState:
    """The running state of one request. It belongs to a request, never to a batch row.

    Ask `next(choice)` with the model's choice, then `advance(action.token)`. `step` does both. The model need not be
    sampled while `needs_choice` is False. `banned()` are ids that must not be sampled now.
    """

    __slots__ = (
        "_after_cause", "_at", "_end", "_end_rule", "_from", "_lead", "_lean", "_lean_age", "_queue", "_special",
        "_start", "_start_rule", "blocks", "cap", "cap_cause", "cause", "config", "forced", "granted", "phase",
        "tag_length", "total", "used",
    )  # fmt: skip

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self.phase: Phase = "idle"
        self.cap = config.cap
        self.cap_cause: StopCause = config.cap_cause
        self.used = 0  # drawn on the cap; in scope `block` only the current block
        self.total = 0  # think tokens of all blocks
        self.forced = 0
        self.blocks = 0
        self.cause: StopCause | None = None
        self.tag_length = 0  # of the end tag that closed the last block
        self.granted = 0  # think tokens that an extra grant has added to the cap
        self._end_rule = matcher(config.end, *config.end_also)
        self._start_rule = matcher(config.think)
        self._special = frozenset((*config.eos, *(tag[0] for tag in (config.end, *config.end_also))))
        self._end = 0  # matcher states
        self._start = 0
        self._from = 0  # `used` when the open block began
        self._lead = 0
        self._queue: tuple[int, ...] = ()
        self._at = 0
        self._after_cause: StopCause | None = None
        self._lean: SoftCause | None = None  # a soft rule brought a token about that may belong to an end tag
        self._lean_age = 0  # tokens since then, that one included

    # -- reading ------------------------------------------------------------------------------------------------
    @property
    def open(self) -> bool:
        """Whether the position is inside a think block (its end tag not complete)."""
        return self.phase in ("counting", "slack", "forcing")

    @property
    def held(self) -> int:
        """Tokens of a begun end tag, not yet counted."""
        return self._end_rule.depth[self._end] if self.phase in ("counting", "slack") else 0

    @property
    def tag_next(self) -> int:
        """The id that begins the end tag here, or continues the one that the model has begun."""
        return self._end_rule.rest[self._end][0]  # type: ignore[return-value]

    @property
    def left(self) -> int | None:
        """Think tokens still allowed, None without a cap."""
        return None if self.cap is None else max(0, self.cap - self.used)

    @property
    def needs_choice(self) -> bool:
        """False where the next token is decided whatever the model would choose."""
        return not (self.phase == "forcing" or self._must_close())

    def banned(self, reopen: bool = True) -> tuple[int, ...]:
        """Ids that would complete an end tag where no block is open: masked in the answer.

        reopen=False: also those that would open another block.
        """
        if self.open:
            return ()
        ids: tuple[int, ...] = self._end_rule.enders[self._end]  # type: ignore[assignment]
        return ids if reopen else ids + self._start_rule.enders[self._start]  # type: ignore[operator]

    # -- deciding -----------------------------------------------------------------------------------------------
    def next(self, choice: int) -> Action:
        """What becomes of the model's `choice`. May enter `forcing`; asking again gives the same answer."""
        phase = self.phase
        if phase == "counting" or phase == "slack":
            if self._must_close():
                self._force(self.cap_cause)
            elif choice in self.config.eos:
                self._force("natural")
            elif not self._fits(choice):
                self._force(self.cap_cause)
            else:
                return Action("continue", choice)
        elif phase != "forcing":
            if self.cause == "user" or choice in self.config.eos:
                return Action("stop", choice)
            return Action("continue", choice)
        return Action("force", self._queue[self._at])

    def advance(self, token: int, origin: Origin = "sampled") -> None:
        """Take one token of the sequence, in order. In `forcing` it must be the token that `next` named."""
        if self.phase == "forcing":
            self._advance_forced(token)
        elif self.phase == "counting" or self.phase == "slack":
            self._advance_open(token, origin)
        else:
            self._start = 0 if origin == "tool" else self._start_rule.step(self._start, token)
            self._end = 0 if origin == "tool" else self._end_rule.step(self._end, token)
            if self._start_rule.hit[self._start] is not None:
                self._open_block()

    def plain(self, choice: int) -> bool:
        """Take the model's choice if it is an ordinary think token that fits: what `step` does with most of them.

        False, and nothing taken, where an end tag, an end of sequence, the cap or a soft rule has a word in it.
        """
        if self._end or choice in self._special or self._lean is not None or self.phase not in ("counting", "slack"):
            return False
        if self.cap is not None and self.used >= self.cap:
            return False
        self._lead = len(self.config.lead)
        self._count(1)
        return True

    def step(self, choice: int) -> Action:
        """`next`, then `advance` with what it decided."""
        action = self.next(choice)
        if action.kind != "stop":
            self.advance(action.token)
        return action

    def prefill(self, ids: tuple[int, ...] | list[int], turn_start: int | None = None) -> None:
        """Take the prompt. Blocks before `turn_start` belong to old turns and change nothing.

        Without `turn_start` only an unclosed block at the end of the prompt belongs to this turn (opened by the
        template, or resumed); its tokens count. With it, closed blocks behind it count as well.
        """
        if turn_start is None:
            turn_start = self._open_tail(ids)
        for token in ids[turn_start:]:
            self.advance(token, "prefilled")

    def lower_cap(self, cap: int, cause: SoftCause) -> bool:
        """The entrance of the soft layer: bring the close nearer. Returns whether the cap fell; it never rises."""
        check_budget(cap)
        if cause not in get_args(SoftCause):
            raise BudgetError(f"a soft rule closes with one of {', '.join(get_args(SoftCause))}; given {cause!r}")
        if self.cap is not None and cap >= self.cap:
            return False
        self.cap, self.cap_cause = cap, cause
        if self.phase == "counting":
            self.phase = "slack"
        return True

    def lean(self, cause: SoftCause = "slack") -> None:
        """The next token is `tag_next`, and a soft rule brought it about: the model alone would have written another.

        Say so before `advance`. If that token ends up in the tag that closes the block, the close has this cause and
        not `natural`; if the model leaves the tag again, nothing is kept of it.
        """
        if self.phase == "counting" or self.phase == "slack":
            self._lean, self._lean_age = cause, 0

    def grant(self, extra: int, ceiling: int) -> bool:
        """The one way up (decisions.md §4): raise a predicted cap by at most `extra` tokens, at most to `ceiling`.

        Once per request, inside a block that is not being closed, never above what was asked for or the limit, and
        not where the guard against loops, a slack rule or the user set the cap. Returns whether the cap rose.
        """
        check_budget(extra)
        check_budget(ceiling)
        config = self.config
        free = self.phase in ("counting", "slack") and self.cap_cause in ("hard", "confidence")
        if self.cap is None or config.predicted is None or self.granted or not free:
            return False
        bounds = [n for n in (config.budget, config.limit) if n is not None]
        raised = min([self.cap + extra, ceiling, *bounds])
        if raised <= self.cap:
            return False
        self.granted, self.cap = raised - self.cap, raised
        if raised in bounds:
            self.cap_cause = "hard" if raised == config.budget else "limit"
            self.phase = "counting"
        return True

    def cancel(self) -> None:
        """The user left: no token follows, cause `user`."""
        self.phase, self.cause = "closed", "user"
        self._queue, self._at = (), 0

    def close_now(self, cause: StopCause = "natural") -> None:
        """Force the end tag from the next token on (the strategy, not the budget, ends the block)."""
        if self.phase in ("counting", "slack"):
            self._force(cause)

    def new_turn(self, tool_result: bool = False) -> None:
        """A new assistant turn in the same conversation. Scope `session` keeps what was used; `tool_loop` keeps it
        while turns are joined by tool results."""
        keep = self.config.scope == "session" or (self.config.scope == "tool_loop" and tool_result)
        kept = self.used, self.cap, self.cap_cause, self.granted
        self.__init__(self.config)  # type: ignore[misc]
        if keep:
            self.used, self.cap, self.cap_cause, self.granted = kept

    # -- clone and rewind ---------------------------------------------------------------------------------------
    def clone(self) -> BudgetState:
        """An independent copy, O(1)."""
        other = BudgetState.__new__(BudgetState)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def mark(self) -> Mark:
        """The present point, for `rewind`."""
        matched = (self._end, self._start, self._from, self._lead, self._lean, self._lean_age)
        inner = (matched, self._at, self._queue, self._after_cause)
        return Mark(self.phase, self.used, self.total, self.forced, self.blocks, self.cause, inner)

    def rewind(self, mark: Mark) -> None:
        """Back to `mark`. The cap stays as low as it has become, and a grant is not given twice."""
        self.phase, self.used, self.total, self.forced, self.blocks, self.cause, inner = mark
        matched, self._at, self._queue, self._after_cause = inner
        self._end, self._start, self._from, self._lead, self._lean, self._lean_age = matched

    # -- inside -------------------------------------------------------------------------------------------------
    def _must_close(self) -> bool:
        if self.cap is None or self.phase not in ("counting", "slack"):
            return False
        nothing_left = self.used == self.cap and self.used == self._from and self._end == 0
        return self.used > self.cap or nothing_left

    def _fits(self, choice: int) -> bool:
        if self.cap is None:
            return True
        rule = self._end_rule
        state = rule.step(self._end, choice)
        hit = rule.hit[state]
        kept = rule.depth[state] if hit is None else hit[1]
        return self.used + rule.depth[self._end] + 1 - kept <= self.cap

    def _force(self, cause: StopCause) -> None:
        begun = self._end
        self.tag_length = len(self.config.end)
        if begun:
            self._queue = self._end_rule.rest[begun]  # type: ignore[assignment]
            self.tag_length = self._end_rule.depth[begun] + len(self._queue)
        elif cause == "natural":
            self._queue = self.config.end
        else:
            self._queue = self.config.transition + self.config.end
        self._at, self._after_cause, self.phase = 0, cause, "forcing"

    def _advance_forced(self, token: int) -> None:
        if token != self._queue[self._at]:
            raise BudgetError(f"token {self._queue[self._at]} must be forced here, but {token} was appended")
        self.forced += 1
        self._at += 1
        if self._at == len(self._queue):
            self._close(self._after_cause)

    def _advance_open(self, token: int, origin: Origin) -> None:
        rule = self._end_rule
        held = rule.depth[self._end]
        if origin == "tool":
            if self.cap is not None and self.used + held > self.cap:
                raise BudgetError("a tool result cannot be inserted into an end tag that the model has begun")
            self._count(held)
            self._end, self._lean = 0, None
            self.forced += 1
            return
        lead = self.config.lead[self._lead : self._lead + 1]
        if origin == "prefilled" and lead == (token,):
            self._lead += 1
            return
        self._lead = len(self.config.lead)
        state = rule.step(self._end, token)
        hit = rule.hit[state]
        kept = rule.depth[state] if hit is None else hit[1]
        fresh = held + 1 - kept
        if origin == "forced":
            self.forced += 1
            fresh = max(0, fresh - 1)
        self._count(fresh)
        self._end = state
        if self._lean is not None:
            self._lean_age += 1
            if self._lean_age > kept:  # the model has left the tag that the rule began
                self._lean = None
        if hit is not None:
            self.tag_length = hit[1]
            self._close(self._lean or "natural")

    def _count(self, n: int) -> None:
        self.used += n
        self.total += n

    def _open_block(self) -> None:
        if self.config.scope == "block":
            self.used = 0
        self.phase = "counting" if self.cap_cause in ("hard", "limit") else "slack"
        self.cause = None
        self.blocks += 1
        self._from, self._lead, self._end, self._start = self.used, 0, 0, 0

    def _close(self, cause: StopCause | None) -> None:
        self.phase, self.cause = "closed", cause
        self._queue, self._at, self._end, self._start, self._lean = (), 0, 0, 0, None

    def _open_tail(self, ids: tuple[int, ...] | list[int]) -> int:
        """Where the unclosed block at the end of `ids` begins, len(ids) when there is none."""
        start = end = 0
        inside: int | None = None
        for at, token in enumerate(ids):
            if inside is None:
                start = self._start_rule.step(start, token)
                if self._start_rule.hit[start] is not None:
                    inside, start, end = at + 1 - len(self.config.think), 0, 0
            else:
                end = self._end_rule.step(end, token)
                if self._end_rule.hit[end] is not None:
                    inside, start, end = None, 0, 0
        return len(ids) if inside is None else inside
