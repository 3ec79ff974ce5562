"""Random token streams against the budget controller, model-free: never above the cap, nothing leaked either way.

Tags of one to five tokens over a small alphabet (so that they overlap, repeat and are begun all the time), shared
prefixes, other spellings, transitions, caps, predictions, soft lowering, grants, eased closes, tool results, rewinds,
prefilled prompts, scopes and many turns. Everything is judged by an oracle that looks back at the whole record.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest

from gnomon.base import seeds
from gnomon.decoding.budget import BudgetConfig, BudgetState, Mark
from gnomon.protocol.layout import Layout
from gnomon.protocol.parser import split, token_splitter

EOS, PLAIN = 90, 50
TRANSITION = (70, 71)
Told = tuple[int, str]  # token, who: "model" | "forced" | "tool" | "prompt" | "lean" (the model, under a bias)
STREAM = 80  # tokens of one stream, about


@dataclass
class Seen:
    """What a campaign met; a test that never meets a thing tests nothing of it."""

    tokens: int = 0
    streams: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    things: Counter[str] = field(default_factory=Counter)


def make_config(r: Random) -> BudgetConfig:
    """Tags over three symbols; start and end tag often share a beginning."""
    while True:
        tag = lambda: tuple(r.randrange(3) for _ in range(r.randint(1, 5)))  # noqa: E731
        end, think = tag(), tag()
        if r.random() < 0.4:
            think = (*end[:-1], 3)
        also = ((*end[:-1], 4),) if r.random() < 0.3 else ()
        if think != end and think not in also:
            break
    number = lambda: r.choice([None, 0, 1, 2, r.randint(3, 12), r.randint(10, 40)])  # noqa: E731
    scope = r.choice(["block", "turn", "turn", "tool_loop", "session"])
    transition = TRANSITION if r.random() < 0.3 else ()
    lead = (PLAIN,) if r.random() < 0.2 else ()
    return BudgetConfig(think, end, number(), number(), scope, transition, lead, (EOS,), also, number())


# -- the oracle: everything again from the record, at the end of every block ---------------------------------------
def find_end(block: list[Told], tags: tuple[tuple[int, ...], ...]) -> tuple[int, int] | None:
    """(index behind the first complete end tag, its length); tool results break a tag. The longest tag wins."""
    for stop in range(1, len(block) + 1):
        sizes = [
            len(tag)
            for tag in tags
            if len(tag) <= stop
            and tuple(t for t, _ in block[stop - len(tag) : stop]) == tag
            and all(who != "tool" for _, who in block[stop - len(tag) : stop])
        ]
        if sizes:
            return stop, max(sizes)
    return None


def thought(block: list[Told], length: int) -> int:
    """Think tokens of a closed block whose end tag has `length` tokens."""
    return sum(who not in ("forced", "tool") for _, who in block[: len(block) - length])


def check_block(state: BudgetState, block: list[Told], before: int, most: int | None) -> None:
    """block: everything behind the start tag, its end tag included, which has just closed. most: `used` at most."""
    tags = (state.config.end, *state.config.end_also)
    found = find_end(block, tags)
    # Nothing of a complete tag stood inside, and the block ends where its tag ends: nothing leaks either way.
    assert found == (len(block), state.tag_length)
    used = thought(block, state.tag_length)
    assert state.used - before == used
    allowed = None if most is None else max(0, most - before)
    assert allowed is None or used <= allowed, "above the cap"
    forced = [at for at, (_, who) in enumerate(block) if who == "forced"]
    assert forced == list(range(len(block) - len(forced), len(block))), "force stands at the end of the block"
    tag = block[len(block) - state.tag_length :]
    if state.cause == "natural":
        assert all(who == "model" for _, who in tag) or all(who == "forced" for _, who in tag) or begun_eos(tag)
    elif state.cause == "slack" and not forced:
        assert any(who == "lean" for _, who in tag)
    else:
        assert forced, "a cut forces something"


def begun_eos(tag: list[Told]) -> bool:
    """A tag that the model began and that an end of sequence had forced to its end."""
    return tag[-1][1] == "forced" and tag[0][1] in ("model", "lean")


# -- one stream -----------------------------------------------------------------------------------------------------
class Stream:
    """One random conversation, token by token, with everything that may happen in between."""

    def __init__(self, r: Random, seen: Seen) -> None:
        self.r, self.seen = r, seen
        self.state = BudgetState(make_config(r))
        self.block: list[Told] | None = None  # since the start tag of the open block
        self.answer: list[int] = []  # since the last close or the start of the turn
        self.before = 0  # `used` when the block began
        self.most: int | None = (
            self.state.cap
        )  # what `used` may reach: the cap, or what was used when the cap fell below it
        self.mark: tuple[Mark, list[Told] | None, list[int], int] | None = None

    def run(self, n: int) -> None:
        if self.r.random() < 0.3:
            self.prompt()
        for _ in range(n):
            self.meddle()
            self.token()
            self.invariants()
        self.seen.tokens += n
        self.seen.streams += 1

    def prompt(self) -> None:
        """A prompt with a closed old block and perhaps an open one."""
        config, r = self.state.config, self.r
        old = [PLAIN, *config.think, PLAIN, 60, *config.end, PLAIN]
        extra = [60, 61][: r.randint(0, 2)]
        opened = r.random() < 0.7
        ids = [*old, *config.think, *config.lead, *extra] if opened else old
        self.state.prefill(ids)
        if opened and self.state.open:
            self.block, self.before = [(t, "prompt") for t in extra], 0
            assert self.state.used == len(extra)
            self.seen.things["prefilled"] += 1
            self.bound()
        else:
            assert self.state.used == 0 or opened

    def meddle(self) -> None:
        """What the soft layer, tools, a search or the user may do before a token."""
        state, r, cap = self.state, self.r, self.state.cap
        dice = r.random()
        if dice < 0.02:
            if state.lower_cap(r.randint(0, 30), r.choice(["slack", "confidence", "loop"])):
                self.bound()
        elif dice < 0.03:
            if state.grant(r.randint(0, 9), r.randint(0, 40)):
                assert cap is not None and state.cap is not None and cap < state.cap <= cap + 9
                self.bound()
                self.seen.things["grant"] += 1
                return
        elif dice < 0.05 and self.block is not None and state.phase in ("counting", "slack"):
            if cap is None or state.used + state.held <= cap:
                state.advance(r.randrange(5), "tool")
                self.block.append((0, "tool"))
                self.seen.things["tool"] += 1
        elif dice < 0.06:
            block = None if self.block is None else list(self.block)
            self.mark = (state.mark(), block, list(self.answer), self.before)
        elif dice < 0.07 and self.mark is not None:
            mark, self.block, self.answer, self.before = self.mark
            state.rewind(mark)
            self.bound()
            self.mark = None
            self.seen.things["rewind"] += 1
        elif dice < 0.08 and state.phase in ("idle", "closed"):
            self.turn()
            return
        assert cap is None or (state.cap is not None and state.cap <= cap), "the cap only falls"

    def bound(self) -> None:
        """The cap has changed, or a prompt or rewind what was used: what is thought cannot be unthought."""
        self.most = None if self.state.cap is None else max(self.state.cap, self.state.used)

    def turn(self) -> None:
        state, config = self.state, self.state.config
        tool = self.r.random() < 0.5
        used, cap = state.used, state.cap
        state.new_turn(tool_result=tool)
        keep = config.scope == "session" or (config.scope == "tool_loop" and tool)
        assert (state.used, state.cap) == ((used, cap) if keep else (0, config.cap))
        self.block, self.answer, self.before, self.mark = None, [], state.used, None
        self.bound()
        self.seen.things["turn"] += 1

    def token(self) -> None:
        """The model wants something; often what the tags consist of."""
        r, state = self.r, self.state
        choice = r.choice([0, 1, 2, 3, 4, 0, 1, 2, PLAIN, PLAIN, 60, EOS if r.random() < 0.1 else 61])
        if r.random() < 0.3:
            tag = r.choice([state.config.end, state.config.think])
            choice = tag[min(len(tag) - 1, state.held)]
        if state.phase == "idle" and r.random() < 0.4:
            self.begin()
            return
        lean = state.open and r.random() < 0.1
        if lean:
            choice = state.tag_next
            state.lean()
        banned = state.banned()
        if choice in banned:
            assert self.block is None
            self.seen.things["banned"] += 1
            return  # a sampler cannot choose it
        was_open, used = state.open, state.used
        action = state.next(choice)
        if action.kind == "stop":
            assert not was_open
            self.turn()
            return
        state.advance(action.token)
        who = "forced" if action.kind == "force" else "lean" if lean else "model"
        self.place(action.token, who, was_open, used)

    def begin(self) -> None:
        """The template or the engine opens the block."""
        state = self.state
        used = state.used
        for token in state.config.think:
            state.advance(token, "forced")
            if state.open:
                break
        self.opened(used)

    def opened(self, used: int) -> None:
        state = self.state
        if state.open and self.block is None:
            self.block, self.answer = [], []
            self.before = 0 if state.config.scope == "block" else used
            self.bound()
            assert state.used == self.before

    def place(self, token: int, who: str, was_open: bool, used: int) -> None:
        state = self.state
        if not was_open:
            self.answer.append(token)
            tags = (state.config.end, *state.config.end_also)
            if not state.open:  # no end tag was completed in the answer
                assert all(tuple(self.answer[-len(tag) :]) != tag for tag in tags)
            self.opened(used)
            return
        assert self.block is not None
        self.block.append((token, who))
        if state.phase == "closed":
            check_block(state, self.block, self.before, self.most)
            self.seen.stops[str(state.cause)] += 1
            if len(state.config.end) > 1 and who == "forced" and self.block[-state.tag_length][1] != "forced":
                self.seen.things["completed"] += 1
            self.block, self.answer = None, []

    def invariants(self) -> None:
        """After every token."""
        state = self.state
        assert state.open == (self.block is not None)
        if self.block is not None and state.phase != "forcing":
            model = sum(who not in ("forced", "tool") for _, who in self.block)
            assert state.used - self.before + state.held == model
        assert self.most is None or state.used <= self.most


def campaign(name: str, tokens: int) -> Seen:
    seen = Seen()
    r = seeds.rng("streams", name)
    while seen.tokens < tokens:
        Stream(r, seen).run(STREAM)
    return seen


def met(seen: Seen) -> None:
    assert set(seen.stops) == {"natural", "slack", "hard", "confidence", "loop", "limit"}, seen.stops
    wanted = {"prefilled", "grant", "tool", "rewind", "turn", "banned", "completed"}
    assert wanted <= set(seen.things), seen.things


def test_no_stream_breaks_the_budget_or_leaks() -> None:
    seen = campaign("fast", 200_000)
    assert seen.tokens >= 200_000
    met(seen)


@pytest.mark.slow
def test_ten_million_tokens() -> None:
    seen = campaign("slow", 10_000_000)
    print(f"{seen.tokens} tokens, {seen.streams} streams; stops {dict(seen.stops)}; {dict(seen.things)}")
    met(seen)


def test_the_oracle_would_see_each_breach() -> None:
    """The gate can fail: an overshoot, a leaked tag, a wrong cause and force in the middle are all noticed."""
    config = BudgetConfig((9,), (1, 2), budget=2)
    good = [(50, "model"), (50, "model"), (1, "forced"), (2, "forced")]

    def closed(cause: str, used: int) -> BudgetState:
        state = BudgetState(config)
        state.advance(9, "forced")
        for _ in range(used):
            state.used += 1
        state.tag_length, state.phase, state.cause = 2, "closed", cause  # type: ignore[assignment]
        return state

    check_block(closed("hard", 2), good, 0, 2)
    bad = {
        "one token too many": (closed("hard", 3), [(50, "model"), *good], 2),
        "a tag inside": (closed("hard", 4), [(1, "model"), (2, "model"), *good], None),
        "text behind the tag": (closed("hard", 2), [*good, (50, "model")], 2),
        "miscounted": (closed("hard", 1), good, 2),
        "a cut called natural": (closed("natural", 2), [*good[:2], (1, "forced"), (2, "model")], 2),
        "force inside": (closed("hard", 1), [(50, "forced"), *good[1:]], 2),
    }
    for what, (state, block, most) in bad.items():
        with pytest.raises(AssertionError):
            check_block(state, block, 0, most)
            pytest.fail(what)


def test_a_controller_that_breaks_a_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign itself can fail: three typical bugs, each found within a few thousand tokens."""
    fits, force = BudgetState._fits, BudgetState._force

    def late(self: BudgetState, choice: int) -> bool:  # N + 1
        return fits(self, choice) or (self.cap is not None and self.used == self.cap)

    def restart(self: BudgetState, cause: str) -> None:  # the begun tag is doubled
        force(self, cause)  # type: ignore[arg-type]
        self._queue = self.config.end

    for name, broken in (("_fits", late), ("_force", restart)):
        with monkeypatch.context() as patched:
            patched.setattr(BudgetState, name, broken)
            with pytest.raises(AssertionError):
                campaign("broken", 20_000)
    with monkeypatch.context() as patched:
        patched.setattr(BudgetState, "banned", lambda self, reopen=True: ())
        with pytest.raises(AssertionError):
            campaign("broken", 20_000)


def test_splitter_and_controller_agree_on_random_streams() -> None:
    """The parser that every surface uses cuts where the controller counted, tags of one to five tokens."""
    r, blocks = seeds.rng("streams", "splitter"), 0
    for _ in range(1500):
        config = make_config(r)
        if find_end([(t, "model") for t in config.think], (config.end, *config.end_also)):
            continue  # an end tag inside the start tag: the splitter swallows stray end tags
        state = BudgetState(config)
        ids: list[int] = []
        while len(ids) < 60:
            if state.phase == "idle" and not ids:
                for token in config.think:
                    state.advance(token, "forced")
                    ids.append(token)
            choice = r.choice([0, 1, 2, 3, 4, PLAIN])
            if state.phase == "closed":
                break
            ids.append(state.step(choice).token)
        layout = Layout(config.think, config.end, (), (80,), {"steps": ()}, (EOS,), 91, end_think_also=config.end_also)
        parts = split(ids, token_splitter(layout, bare=True))
        extra = len(TRANSITION) if config.transition and state.cause not in (None, "natural") else 0
        if state.phase == "closed":
            blocks += 1
            body = ids[len(config.think) : len(ids) - state.tag_length]
            assert (list(parts.think), parts.answer, parts.truncated) == (body, (), False)
            assert len(body) - state.used in (0, extra)
        else:
            assert parts.truncated and parts.answer == () and list(parts.think) == ids[len(config.think) :]
    assert blocks > 800


def values(state: BudgetState) -> dict[str, object]:
    return {name: getattr(state, name) for name in BudgetState.__slots__}


def test_the_plain_path_takes_what_the_step_would_have_taken() -> None:
    taken = left = 0
    for i in range(600):
        r = seeds.rng("plain", i)
        state = BudgetState(make_config(r))
        state.prefill(list(state.config.think))
        for _ in range(60):
            token = r.choice((0, 1, 2, 3, 4, PLAIN, PLAIN, PLAIN, EOS if r.random() < 0.05 else PLAIN))
            if not state.open:
                break
            if r.random() < 0.03:
                state.lower_cap(state.used + r.randrange(4), "slack")
            fast, before = state.clone(), values(state)
            took = fast.plain(token)
            action = state.step(token)
            assert took or values(fast) == before
            if took:
                assert action == ("continue", token) and values(fast) == values(state)
            taken, left = taken + took, left + (not took)
    assert taken > 500 and left > 500
