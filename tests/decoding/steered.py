"""Steering the slow way: a pass over the whole sequence without a cache, position by position (decisions.md §6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tests.decoding.tiny import Tiny, _begun, _draw, _ends, norm
from tests.training.test_thoughts import random_steerer
from torch import Tensor

from gnomon.base.seeds import seed_torch
from gnomon.metacognition.config import THINK_SITE, MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import SteerConfig, Steerer
from gnomon.model.backbone import OwnBackbone
from gnomon.model.decoder import Decoder, DecoderConfig
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request, Trace


def text_decoder(streams: int = 2) -> Decoder:
    """Our decoder with the vocabulary of `tiny.TEXT`: 3 blocks, random everywhere, leaning towards its tags."""
    tags = {0: 1.5, 2: 2.0, 4: 2.0, 12: 2.5, 13: 2.5, 18: 1.5}
    seed_torch("steered", streams)
    net = Decoder(DecoderConfig(vocab_size=32, channels=32, layers=3, heads=2, context=160, streams=streams))
    with torch.no_grad():
        torch.nn.init.normal_(net.unembed.weight, std=0.3)
        for token, by in tags.items():
            net.unembed.weight[token] *= by
        for block in net.blocks:
            torch.nn.init.normal_(block.attention.out.weight, std=0.2)
            torch.nn.init.normal_(block.mlp.out.weight, std=0.2)
        torch.nn.init.normal_(net.before.weight, std=0.1)
    return net.eval()


def heads_for(backbone: Any, **options: Any) -> MetacogHeads:
    """Random heads that know two plans and predict about twenty tokens."""
    seed_torch("steered-heads", str(options))
    heads = MetacogHeads(
        MetacogConfig(
            n_layers=backbone.n_layers, hidden_size=backbone.hidden_size, proj_dim=8, width=16,
            plans=("direct", "steps"), **options,
        )
    )  # fmt: skip
    heads.start_from(3.0, 0.6)
    return heads.eval()


def steered(heads: MetacogHeads, scale: float = 1.0, **options: Any) -> Decider:
    return Decider(heads, None, random_steerer(heads, scale, **options))


def fresh(heads: MetacogHeads) -> Decider:
    """With a steerer that was never trained."""
    seed_torch("fresh")
    return Decider(heads, None, Steerer(SteerConfig(rank=3), heads.config))


def inside(trace: Trace, layout: Layout) -> list[bool]:
    """Which of `trace.ids` are steered: chosen by the model, strictly inside the block, no part of a begun end tag."""
    tags = (layout.end_think, *layout.end_think_also)
    begin, end = trace.think_span
    return [
        begin <= at < end and role == "sampled" and not _begun(trace.ids[begin : at + 1], tags)[0]
        for at, role in enumerate(trace.roles)
    ]


class Naive:
    """What a base would compute for a finished trace."""

    def __init__(self, backbone: Any, layout: Layout, decider: Decider | None) -> None:
        self.backbone, self.layout, self.decider = backbone, layout, decider

    def __call__(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """-> logits [len(ids), V] in front of every id, states [len(ids), L, C] behind it."""
        prompt = len(trace.prompt_ids)
        ids, think = [*trace.prompt_ids, *trace.ids], prompt + trace.think_span[0]
        where = [False] * prompt + inside(trace, self.layout)
        gate = None
        if self.decider is not None:
            _, states = self._pass(ids[:think], [False] * think, None)
            gate = self._gate(states[-1], trace.plan)
        logits, states = self._pass(ids, where, gate)
        return logits[prompt - 1 : -1], states[prompt:]

    def _gate(self, taps: Tensor, plan: str) -> Tensor | None:
        assert self.decider is not None and self.decider.steerer is not None
        gate, heads = self.decider.steerer.gate, self.decider.heads
        if gate is None:
            return None
        with torch.no_grad():
            read = heads(taps[None], torch.tensor([THINK_SITE]), torch.zeros(1))
            chosen = torch.tensor([float(plan == name) for name in self.decider.plans])
            said = torch.cat([read.g[0], chosen, torch.sigmoid(read.conf_raw)])
            return 1 + 0.5 * torch.tanh(gate.out.weight @ said + gate.out.bias)

    def _steer(self, index: int, x: Tensor, where: Sequence[bool], gate: Tensor | None) -> Tensor:
        """x [T, C] or [T, n, C] behind block `index`."""
        if self.decider is None or self.decider.steerer is None:
            return x
        made = self.decider.steerer.steering()
        x = x.clone()
        for t in [t for t, within in enumerate(where) if within]:
            if (a := made.adapters.get(index)) is not None:
                mean = x[t].mean(0) if x.ndim == 3 else x[t]
                h = mean / math.sqrt(float(mean.square().mean()) + 1e-6)
                z = min(1.0, max(0.0, 1.2 / (1 + math.exp(-float(h @ a.weight + a.bias))) - 0.1))
                x[t] += z * (a.up @ (a.down @ h))
            if index == made.gate_layer:
                assert gate is not None
                x[t] *= gate
        return x

    @torch.no_grad()
    def _pass(self, ids: list[int], where: list[bool], gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> logits [T, V], states [T, L, C]."""
        net = self.backbone
        if isinstance(net, OwnBackbone):
            out = net.module(
                torch.tensor([ids]), want_states=True, steer=lambda i, x: self._steer(i, x[0], where, gate)[None]
            )
            assert out.logits is not None
            return out.logits[0], torch.stack([s[0] for s in out.states], 1)
        assert isinstance(net, Tiny)
        n, states = len(ids), []
        x = net.embed[ids] + net.places[:n]
        for i in range(net.n_layers):
            q, k, v = (z.view(n, net.heads, -1).transpose(0, 1) for z in (norm(x) @ net.qkv[i]).chunk(3, -1))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])) + torch.full((n, n), -torch.inf).triu(1)
            x = self._steer(i, x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1) @ net.out[i], where, gate)
            states.append(x)
        return norm(x) @ net.unembed + net.bias, torch.stack(states, 1)


def banned(layout: Layout, trace: Trace, at: int) -> set[int]:
    """Ids that may not be sampled in front of position `at`: single ones, and those that complete a stray tag."""
    answer, thinking = trace.answer_span[0], at < trace.answer_span[0]
    found, ids = set(layout.masked(thinking)), list(trace.ids)
    before = ids[trace.think_span[0] : at] if thinking else ids[answer:at]
    ends = (layout.end_think, *layout.end_think_also)
    long = [t for t in (layout.answer, layout.end_answer) if len(t) > 1] if thinking else []
    for token in {t for tag in (*ends, layout.think, layout.answer, layout.end_answer) for t in tag}:
        if thinking and _ends([*before, token], long):
            found.add(token)
        if not thinking and _ends([*layout.answer, *before, token], (*ends, layout.think)):
            found.add(token)
        if not thinking and len(layout.answer) > 1 and _ends([*before, token], (layout.answer,)):
            found.add(token)
    return found


def judge(trace: Trace, request: Request, logits: Tensor, layout: Layout, think: dict[str, float] | None = None) -> int:
    """Every token and log-prob of a trace against naive logits [len(ids), V]; returns how many were drawn.

    think: settings of the sampler inside the thought, where they are not the request's.
    """
    drawn = 0
    start, after = trace.think_span[0], trace.answer_span[0]
    for at, (token, role, logprob) in enumerate(zip(trace.ids, trace.roles, trace.logprobs, strict=True)):
        if role != "sampled" or at < start + trace.resumed:
            assert logprob == 0.0
            continue
        asked = replace(request, **think) if think is not None and at < after else request
        want, expected = _draw(logits[at].double().numpy(), banned(layout, trace, at), asked, trace.sample, at - start)
        assert want == token, (trace.id, at, want, token)
        assert np.isclose(logprob, expected, atol=1e-4), (trace.id, at, logprob, expected)
        drawn += 1
    return drawn
