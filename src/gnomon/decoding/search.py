"""Search on the engine: several sampled paths of a request, and what they agree on. It never sees a gold answer.

Self-consistency (Wang et al. 2022, arXiv 2203.11171): n paths, the majority answer; where they disagree, some more
under another strategy. Best of n: the path that the model itself is most confident of. All paths of all requests go
through one `Engine.run`, equal prompts are computed once, and equal seeds give equal results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gnomon.base.errors import ConfigError
from gnomon.decoding.budget import check_budget
from gnomon.decoding.engine import Engine
from gnomon.decoding.row import left
from gnomon.protocol.trace import Request, Trace

Read = Callable[[Trace], str]
Normalise = Callable[[str], str]
OnTrace = Callable[[Trace], None]
Score = Literal["confidence", "logprob"]


@dataclass(frozen=True)
class Votes:
    """How to vote.

    paths: samples in the first round. agree: where the top answer has a smaller share of the paths, `extra` more are
    drawn under the strategy `reflect` (None: the request's own) and all are counted again, at most `rounds` times;
    rounds 0 never reflects. total: think tokens of all paths and rounds together (None: each path has its own budget).
    """

    paths: int = 5
    agree: float = 0.6
    extra: int = 3
    rounds: int = 1
    reflect: str | None = "verify"
    total: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("paths", 1), ("extra", 1), ("rounds", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number ≥ {least}; given {value!r}")
        if not 0.0 <= self.agree <= 1.0:
            raise ConfigError(f"agree is a share between 0 and 1; given {self.agree!r}")
        check_budget(self.total)


@dataclass(frozen=True)
class Vote:
    """What the paths of one request agree on.

    answer: the text of `trace`, the path that stands for the winning answer. share: how many of all paths gave it (a
    path whose answer is empty or cut abstains). counts: normalised answer -> paths, most first. rounds: 1 = they agreed
    at once.
    """

    id: str
    answer: str
    share: float
    counts: Mapping[str, int]
    trace: Trace
    traces: tuple[Trace, ...]
    rounds: int = 1

    @property
    def think_tokens(self) -> int:
        """Think tokens of all paths."""
        return sum(t.used for t in self.traces)

    @property
    def answer_tokens(self) -> int:
        """Answer tokens of all paths."""
        return sum(t.answer_tokens for t in self.traces)

    @property
    def tokens(self) -> int:
        """What the answer cost: think and answer tokens of all paths."""
        return self.think_tokens + self.answer_tokens


@dataclass(frozen=True)
class Best:
    """The path with the highest score. scores: one per trace, in order; scored_by: what they are."""

    id: str
    answer: str
    trace: Trace
    traces: tuple[Trace, ...]
    scores: tuple[float, ...]
    scored_by: str


def self_consistency(
    engine: Engine,
    request: Request,
    n: int = 5,
    *,
    read: Read | None = None,
    normalise: Normalise = str.strip,
    agree: float = 0.6,
    extra: int = 3,
    rounds: int = 1,
    reflect: str | None = "verify",
    total: int | None = None,
) -> Vote:
    """The majority answer of n paths of one request; options as in `Votes`, `vote` does many at once."""
    votes = Votes(n, agree, extra, rounds, reflect, total)
    return vote(engine, [request], votes, read=read, normalise=normalise)[0]


def vote(
    engine: Engine,
    requests: Sequence[Request],
    votes: Votes | None = None,
    *,
    read: Read | None = None,
    normalise: Normalise = str.strip,
    on_trace: OnTrace | None = None,
) -> list[Vote]:
    """One Vote per request, in order.

    read: a trace -> its answer text (by default the engine's own `decode`). normalise: what counts as the same answer.
    Ties: the higher mean confidence (where the model has a layer), then fewer tokens, then the earlier path. The paths
    of the first round without `total` are exactly `engine.run` of the request with n = paths; further ones carry ids
    with a suffix. Raises ConfigError where several paths are asked at temperature 0, and what the engine refuses.
    """
    votes, read = votes or Votes(), read or _reader(engine)
    for request in requests:
        _check(request, votes.paths)
    rounds = votes.rounds if votes.paths > 1 else 0
    if rounds and votes.reflect is not None:
        engine.layout.plan_ids(votes.reflect)
    groups = [_paths(engine, request, votes.paths, votes.total) for request in requests]
    found = [
        tally(request.id, traces, read, normalise)
        for request, traces in zip(requests, _run(engine, groups, on_trace), strict=True)
    ]
    for number in range(1, rounds + 1):
        split = [i for i, v in enumerate(found) if v.share < votes.agree and _left(v, votes.total) != 0]
        if not split:
            break
        groups = []
        for i in split:
            again = replace(requests[i], id=f"{requests[i].id}/reflect{number}", plan=votes.reflect or requests[i].plan)
            groups.append(_paths(engine, again, votes.extra, _left(found[i], votes.total)))
        for i, traces in zip(split, _run(engine, groups, on_trace), strict=True):
            found[i] = tally(requests[i].id, (*found[i].traces, *traces), read, normalise, number + 1)
    return found


def tally(ident: str, traces: Sequence[Trace], read: Read, normalise: Normalise = str.strip, rounds: int = 1) -> Vote:
    """Count the answers of finished paths; where nobody answered, the most confident path stands with share 0."""
    sure = _confidences(traces) or [0.0] * len(traces)
    groups: dict[str, list[int]] = {}
    for i, trace in enumerate(traces):
        if trace.answered:
            groups.setdefault(normalise(read(trace)), []).append(i)

    def rank(i: int) -> tuple[bool, float, int]:
        return traces[i].answer_tokens > 0, sure[i], -_cost(traces[i])

    def weight(members: list[int]) -> tuple[int, float, int]:
        return len(members), sum(sure[i] for i in members) / len(members), -sum(_cost(traces[i]) for i in members)

    # sorted and max keep the earlier one of equals, so that the order of the paths decides last.
    order = sorted(groups, key=lambda key: weight(groups[key]), reverse=True)
    members = groups[order[0]] if order else list(range(len(traces)))
    best = traces[max(members, key=rank)]
    counts = {key: len(groups[key]) for key in order}
    share = counts[order[0]] / len(traces) if order else 0.0
    return Vote(ident, read(best), share, counts, best, tuple(traces), rounds)


def best_of_n(
    engine: Engine,
    request: Request,
    n: int,
    score: Score = "confidence",
    *,
    read: Read | None = None,
    total: int | None = None,
) -> Best:
    """The path of one request with the highest score; `best_of` does many at once."""
    return best_of(engine, [request], n, score, read=read, total=total)[0]


def best_of(
    engine: Engine,
    requests: Sequence[Request],
    n: int,
    score: Score = "confidence",
    *,
    read: Read | None = None,
    total: int | None = None,
    on_trace: OnTrace | None = None,
) -> list[Best]:
    """One Best per request, in order. An empty or cut answer never beats a whole one.

    score: "confidence" after thinking (calibrated where every path is, else uncalibrated; without a layer the answer's
    log-prob per token), or "logprob". total: think tokens of all paths of a request. Raises as `vote` does.
    """
    if score not in ("confidence", "logprob"):
        raise ConfigError(f'unknown score {score!r}; write "confidence" or "logprob"')
    check_budget(total)
    read = read or _reader(engine)
    for request in requests:
        _check(request, n)
    found = []
    groups = [_paths(engine, request, n, total) for request in requests]
    for request, traces in zip(requests, _run(engine, groups, on_trace), strict=True):
        scores, name = _scores(traces, score)
        pairs = list(zip(traces, scores, strict=True))
        best = max(pairs, key=lambda pair: (pair[0].answered, pair[1], -_cost(pair[0])))[0]
        found.append(Best(request.id, read(best), best, tuple(traces), tuple(scores), name))
    return found


def spread(total: int, n: int) -> list[tuple[int, int]]:
    """`total` tokens over n paths as evenly as whole tokens allow: (tokens each, how many paths)."""
    low, more = divmod(total, n)
    return [(tokens, paths) for tokens, paths in ((low + 1, more), (low, n - more)) if paths]


def _paths(engine: Engine, request: Request, n: int, total: int | None) -> list[Request]:
    """The requests of n paths. Under a `total` each gets a hard cap of its own, and the caps add up to it at most."""
    if total is None:
        return [replace(request, n=n)]
    own, limit, asked = request.budget, engine.check(request).limit, left(request)
    most = limit if asked is None else min(asked, limit)
    if total // n < len(request.think_prefix):
        raise ConfigError(
            f"request {request.id!r}: total {total} gives each of {n} paths {total // n} think tokens, but its think "
            f"prefix has {len(request.think_prefix)}; raise `total` or ask for fewer paths"
        )
    return [
        replace(
            request,
            id=f"{request.id}/{part}" if part else request.id,
            n=paths,
            budget=min(tokens, most),
            spent=0,
            use_prediction=request.use_prediction and own is not None,
        )
        for part, (tokens, paths) in enumerate(spread(total, n))
    ]


def _run(engine: Engine, groups: Sequence[Sequence[Request]], on_trace: OnTrace | None) -> list[list[Trace]]:
    """All requests in one run; the traces of each group together."""
    traces = iter(engine.run([request for group in groups for request in group], on_trace=on_trace))
    return [[next(traces) for request in group for _ in range(request.n)] for group in groups]


def _check(request: Request, n: int) -> None:
    if n < 1:
        raise ConfigError(f"request {request.id!r}: {n} paths; ask for at least one")
    if n > 1 and request.temperature == 0:
        raise ConfigError(
            f"request {request.id!r}: {n} paths at temperature 0 are {n} times the same one; "
            "give a temperature above 0 (0.8, say), or ask for one path"
        )


def _reader(engine: Engine) -> Read:
    decode = engine.decode
    if decode is None:
        raise ConfigError("this engine has no `decode`; give `read`, a function from a trace to its answer text")
    return lambda trace: decode(trace.answer_ids).strip()


def _left(found: Vote, total: int | None) -> int | None:
    return None if total is None else total - found.think_tokens


def _cost(trace: Trace) -> int:
    return trace.used + trace.answer_tokens


def _confidences(traces: Sequence[Trace]) -> list[float] | None:
    """Confidence after thinking per path on one scale: calibrated where all are, else uncalibrated, else None."""
    known = [t.confidence_after for t in traces if t.confidence_after is not None]
    if len(known) == len(traces):
        return known
    raw = [t.confidence_after_raw for t in traces if t.confidence_after_raw is not None]
    return [_sigmoid(x) for x in raw] if len(raw) == len(traces) else None


def _scores(traces: Sequence[Trace], score: Score) -> tuple[list[float], str]:
    sure = _confidences(traces) if score == "confidence" else None
    if sure is not None:
        calibrated = all(t.confidence_after is not None for t in traces)
        return sure, "confidence" if calibrated else "uncalibrated confidence"
    return [-math.inf if t.answer_logprob is None else t.answer_logprob for t in traces], "answer log-prob"


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
