"""Tiny models of our own kind with the shipped tokenizer: one random, one that was taught a little."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gnomon.base import seeds
from gnomon.data.encode import encode_record
from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
from gnomon.model.decoder import Decoder, DecoderConfig
from gnomon.model.folder import save_decoder
from gnomon.model.steering import Steering
from gnomon.protocol.layout import Layout
from gnomon.protocol.tags import STRATEGIES
from gnomon.reasoner import shipped
from gnomon.tasks.procedural import family, problems


@dataclass
class Said:
    """What a stand-in for the metacognitive layer decides, at every site."""

    plan: str = "steps"
    probs: Any = None
    predicted: float = 0.0
    clipped: int = 0
    confidence: float | None = 0.5
    calibrated: bool = True
    raw: float = 0.0
    remaining: float = 0.0
    upper: int = 0
    gate: Tensor | None = None
    at_boundaries: bool = True
    promised: float | None = None


class Layer:
    """The stand-in's base: a layer that says nothing at boundaries, and acts on nothing."""

    reads_boundaries = modulates = closes = False
    steering: Steering | None = None

    def policy(self, taps: Tensor, plans: Sequence[str]) -> list[None]:
        raise AssertionError("this layer must not be asked for policies")

    def reached(
        self, taps: Tensor, ends: Sequence[bool], plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool]
    ) -> list[Said]:
        """Row by row, from `after` and `running`, each asked once for all of its rows."""
        found: dict[int, Said] = {}
        for end, ask in ((True, self.after), (False, self.running)):
            at = [i for i, e in enumerate(ends) if e is end]
            if at:
                said = ask(taps[at], *([values[i] for i in at] for values in (plans, used, calibrated)))
                found |= dict(zip(at, said, strict=True))
        return [found[i] for i in range(len(ends))]

    def after(self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: object = None) -> list[Said]:
        raise AssertionError("this layer must not be asked at end tags")

    def running(self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: object = None) -> list[Said]:
        raise AssertionError("this layer must not be asked at boundaries")


def tokenizer() -> Tokenizer:
    return Tokenizer.load(shipped("nano"))


def layout() -> Layout:
    return Layout.atomic(tokenizer())


def decoder(name: str = "tiny", context: int = 512, streams: int = 2) -> Decoder:
    """2 blocks, 32 channels, random everywhere; its output layer leans towards the tags that end things."""
    tok = tokenizer()
    seeds.seed_torch("own", name)
    net = Decoder(
        DecoderConfig(vocab_size=tok.vocab_size, channels=32, layers=2, heads=2, context=context, streams=streams)
    )
    with torch.no_grad():
        torch.nn.init.normal_(net.unembed.weight, std=0.3)
        net.unembed.weight[[tok.end_think, tok.end_answer, tok.eos]] *= 1.8
        for block in net.blocks:
            torch.nn.init.normal_(block.attention.out.weight, std=0.2)
            torch.nn.init.normal_(block.mlp.out.weight, std=0.2)
        torch.nn.init.normal_(net.before.weight, std=0.1)
    return net.eval()


def save(net: Decoder, folder: Path) -> Path:
    """A base folder as `Reasoner.load` reads it."""
    save_decoder(folder, net, "fp32")
    shutil.copyfile(shipped("nano") / MODEL_FILE, folder / MODEL_FILE)
    return folder


def taught(task: str = "boolean", level: int = 1, steps: int = 120, batch: int = 24) -> Decoder:
    """The tiny model after some steps on gold records of one family: it closes its blocks and often answers right."""
    tok, net = tokenizer(), decoder(f"taught-{task}", streams=1)
    rows = []
    for i, problem in enumerate(problems(task, "train", "taught", 240, (level,))):
        strategy = STRATEGIES[i % 4]
        gold = family(task).gold(problem, strategy, seeds.rng("taught", i))
        rows.append(encode_record(tok, problem.prompt, strategy, gold.nodes, gold.answer))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.98))
    draw = seeds.rng("taught-batches")
    net.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10) * (1.0 - 0.9 * step / steps)
        picked = draw.sample(rows, batch)
        width = max(len(r.ids) for r in picked)
        ids = torch.tensor([r.ids + [tok.pad] * (width - len(r.ids)) for r in picked])
        loss = torch.tensor([r.loss + [0] * (width - len(r.ids)) for r in picked])[:, 1:].bool()
        logits = net(ids[:, :-1]).logits
        assert logits is not None
        optimizer.zero_grad()
        F.cross_entropy(logits[loss], ids[:, 1:][loss]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval()
