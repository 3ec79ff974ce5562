"""A two-layer random attention model behind the Backbone protocol, and the slow oracle that the engine must equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnomon.base import seeds
from gnomon.decoding.sampling import stream_key, uniforms
from gnomon.model.backbone import BackboneOutput, Taps, Tokens, laid_out, stacked, wanted
from gnomon.model.slots import TensorSlots, start_pass
from gnomon.model.steering import Steer
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request

V = 32
ATOMIC = Layout(
    think=(1,), end_think=(2,), answer=(3,), end_answer=(4,), eos=(5,), pad=0,
    plans={"direct": (6,), "steps": (7,)}, boundary=frozenset((10, 11)), banned=frozenset((8,)),
)  # fmt: skip
TEXT = Layout(
    think=(12, 1), end_think=(12, 13, 2), answer=(12, 3), end_answer=(12, 13, 4), eos=(0,), pad=0,
    plans={"direct": (6, 14, 15), "steps": (7,)}, transition=(16, 17), end_think_also=((18, 13),),
)  # fmt: skip


class Tiny:
    """Deterministic weights from a name; `steps` counts forward passes, `tapped` those that returned states."""

    n_layers, hidden_size, vocab_size = 2, 16, V

    def __init__(self, name: str = "a", context: int = 160, lean: dict[int, float] | None = None) -> None:
        g = seeds.torch_generator("tiny", name)
        c, self.heads = self.hidden_size, 2
        make = lambda *shape: torch.randn(*shape, generator=g) / math.sqrt(shape[0])  # noqa: E731
        self.embed = torch.randn(V, c, generator=g)
        self.places = torch.randn(context, c, generator=g) * 0.7
        self.qkv = [make(c, 3 * c) * 1.5 for _ in range(2)]
        self.out = [make(c, c) * 1.5 for _ in range(2)]
        self.unembed = make(c, V) * 1.5
        self.bias = torch.zeros(V)
        for token, value in (lean or {}).items():
            self.bias[token] = value
        self.context, self.device = context, torch.device("cpu")
        self.steps = self.tapped = 0
        self.widths: list[int] = []  # rows of every pass

    def new_cache(self, slots: int, capacity: int) -> TensorSlots:
        return TensorSlots(2, slots, self.heads, capacity, self.hidden_size // self.heads, self.embed)

    def extend(
        self,
        cache: Any,
        tokens: Tokens,
        first: int = 0,
        *,
        logits: str = "last",
        taps: Taps = False,
        steer: Steer | None = None,
    ) -> BackboneOutput:
        self.steps += 1
        asked = wanted(taps, len(tokens))
        self.tapped += bool(asked)
        self.widths.append(len(tokens))
        run = start_pass(cache, tokens, first, self.context, len(tokens))
        guided = laid_out(steer, run)
        b, t = run.ids.shape
        assert int((cache.lengths[first : first + b] + run.counts).max()) <= self.context
        x = self.embed[run.ids] + self.places[run.places]
        states = []
        for i in range(2):
            q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in (norm(x) @ self.qkv[i]).chunk(3, -1))
            k, v = run.append(i, k, v)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~run.mask, -torch.inf)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1) @ self.out[i]
            x = x if guided is None else guided(i, x)
            states.append(x[torch.arange(b), run.last])
        run.advance(t)
        found = None if logits == "none" else norm(states[-1]) @ self.unembed + self.bias
        return BackboneOutput(found, stacked(states, asked))


def norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@dataclass
class Expected:
    ids: list[int]
    logprobs: list[float]
    used: int
    forced: int
    stop: str
    finish: str


def _full(backbone: Tiny, ids: Sequence[int]) -> np.ndarray:
    """Logits behind `ids`, all positions again, no cache, no padding."""
    out = backbone.extend(backbone.new_cache(1, len(ids)), [list(ids)])
    return out.logits[0].double().numpy()  # type: ignore[no-any-return]


def _draw(logits: np.ndarray, banned: set[int], request: Request, sample: int, step: int) -> tuple[int, float]:
    """One token, the textbook way, one row at a time in float64."""
    z = logits.copy()
    z[sorted(banned)] = -np.inf
    if request.temperature == 0:
        token = int(z.argmax())
        return token, float(z[token] - z.max() - np.log(np.exp(z - z.max()).sum()))
    p = np.exp((z - z.max()) / request.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: request.top_k or len(order)]
    mass = sum(p[i] for i in kept)
    nucleus, total = [], 0.0
    for i in kept:
        if nucleus and total >= request.top_p:
            break
        nucleus.append(i)
        total += p[i] / mass
    q = np.zeros_like(p)
    q[nucleus] = p[nucleus] / p[nucleus].sum()
    key = stream_key(request.seed, request.id, sample)
    u = uniforms(np.array([key], dtype=np.uint64), np.array([step], dtype=np.uint64))[0]
    token = int(np.searchsorted(np.cumsum(q), u, side="right"))
    return token, float(np.log(q[token]))


def _ends(ids: Sequence[int], tags: Sequence[tuple[int, ...]]) -> int:
    """Length of the tag that `ids` ends with, else 0."""
    return max((len(t) for t in tags if tuple(ids[-len(t) :]) == t), default=0)


def _begun(ids: Sequence[int], tags: Sequence[tuple[int, ...]]) -> tuple[int, tuple[int, ...]]:
    """Longest suffix of `ids` that begins a tag, and what completes that tag."""
    for n in range(min(len(ids), 5), 0, -1):
        for tag in tags:
            if len(tag) > n and tuple(ids[-n:]) == tag[:n]:
                return n, tag[n:]
    return 0, ()


def oracle(backbone: Tiny, layout: Layout, request: Request, limit: int, max_answer: int, sample: int = 0) -> Expected:
    """One request with a full forward pass per token and rules that rescan everything."""
    head = [*layout.plans[request.plan], *layout.think]
    cap = limit if request.budget is None else min(int(request.budget), limit)
    out, lps, think = list(head), [0.0] * len(head), []
    tags = (layout.end_think, *layout.end_think_also)
    stop, forced, step = "", 0, 0
    prompt = list(request.prompt_ids)
    cause = "limit" if request.budget is None else "hard"
    rest: tuple[int, ...] = layout.transition + layout.end_think if cap == 0 else ()
    stop = cause if cap == 0 else ""
    while not stop:
        banned = set(layout.masked(True))
        banned |= {
            t for t in range(V) if _ends([*think, t], [x for x in (layout.answer, layout.end_answer) if len(x) > 1])
        }
        token, lp = _draw(_full(backbone, prompt + out), banned, request, sample, step)
        begun, completion = _begun(think, tags)
        after = [*think, token]
        tag = _ends(after, tags)
        ordinary = len(after) - (tag or _begun(after, tags)[0])
        if token in layout.eos or ordinary > cap:
            stop = "natural" if token in layout.eos else cause
            rest = completion if begun else (() if stop == "natural" else layout.transition) + layout.end_think
            think = think[: len(think) - begun]
            break
        think, step = after, step + 1
        out.append(token)
        lps.append(lp)
        if tag:
            stop, think = "natural", think[: len(think) - tag]
    forced = len(rest)
    step += len(rest) + len(layout.answer)
    out += [*rest, *layout.answer]
    lps += [0.0] * (len(rest) + len(layout.answer))
    answer: list[int] = []
    while True:
        logits = _full(backbone, prompt + out)
        banned = set(layout.masked(False))
        for t in range(V):  # nothing may complete an end tag or open a block again
            if _ends([*layout.answer, *answer, t], (*tags, layout.think)):
                banned.add(t)
            if len(layout.answer) > 1 and _ends([*answer, t], (layout.answer,)):
                banned.add(t)
        token, lp = _draw(logits, banned, request, sample, step)
        step += 1
        if token in layout.eos:
            return Expected([*out, token], [*lps, lp], len(think), forced, stop, "eos")
        answer.append(token)
        if _ends(answer, (layout.end_answer,)):
            return Expected([*out, token], [*lps, lp], len(think), forced, stop, "end")
        if len(answer) - _begun(answer, (layout.end_answer,))[0] > max_answer:
            return Expected(out, lps, len(think), forced, stop, "length")
        out.append(token)
        lps.append(lp)
