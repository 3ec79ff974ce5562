"""A model on this machine as a conformance client: what its engine streams is split and counted again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from gnomon.base.errors import GnomonError
from gnomon.conformance.budget import Ask, Completion
from gnomon.data.codec import Codec
from gnomon.decoding.engine import Engine
from gnomon.decoding.sampling import stream_key, uniforms
from gnomon.protocol.layout import Layout
from gnomon.protocol.parser import token_splitter
from gnomon.protocol.trace import Chunk, Request, Trace
from gnomon.reasoner import Reasoner

Ids = tuple[int, ...]


class EngineClient:
    """An engine as a Client: questions join a running session between steps, tokens are counted as they stream."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self.engine, self.codec = engine, codec
        self.strategies = tuple(codec.strategies)
        self.predicts = engine.metacog is not None

    @classmethod
    def of(cls, reasoner: Reasoner, max_batch: int = 32) -> EngineClient:
        return cls(reasoner.engine(max_batch), reasoner.codec)

    def ask(self, asks: Sequence[Ask]) -> list[Completion]:
        heard: dict[tuple[str, int], list[Chunk]] = {}
        traces: list[Trace] = []
        by_id = {ask.id: ask for ask in asks}
        received: Counter[str] = Counter()

        def sink(chunk: Chunk) -> None:
            heard.setdefault((chunk.id, chunk.sample), []).append(chunk)
            received[chunk.id] += 1
            if received[chunk.id] == by_id[chunk.id].cancel_after:
                session.cancel(chunk.id)

        session = self.engine.session(sink=sink, on_trace=traces.append)
        waiting, out, step, busy = deque(sorted(asks, key=lambda a: a.join)), list[Completion](), 0, False
        while waiting or busy:
            while waiting and (waiting[0].join <= step or not busy):
                ask = waiting.popleft()
                try:
                    session.submit(self._request(ask))
                except GnomonError as error:
                    out.append(Completion(ask.id, refused=str(error)))
                    continue
                busy = True
                if ask.cancel_after == 0:
                    session.cancel(ask.id)
            busy, step = session.step(), step + 1
        for trace in traces:
            cancelled = by_id[trace.id].cancel_after is not None and trace.finish == "user"
            out.append(completion(self.codec, heard.get((trace.id, trace.sample), []), trace, cancelled))
        return out

    def gap(self, ask: Ask, one: Completion, other: Completion) -> float | None:
        """Greedy: the distance of the two best logits. Sampled: of the row's random number to the nearest edge."""
        at = next((i for i, (x, y) in enumerate(zip(one.tokens, other.tokens, strict=False)) if x != y), None)
        if at is None:
            return None
        layout, backbone = self.codec.layout, self.engine.backbone
        before = one.tokens[:at]
        ids = (*self.codec.encode_prompt(ask.prompt), *before)
        logits = backbone.extend(backbone.new_cache(1, len(ids)), [ids]).logits
        assert logits is not None
        splitter = token_splitter(layout, bare=not layout.answer)
        splitter.feed(before)
        z = logits[0].double().cpu()
        z[sorted(layout.masked(splitter.place == "think"))] = -torch.inf
        if ask.temperature == 0:
            best = z.topk(2).values
            return float(best[0] - best[1])
        opened = len(layout.plan_ids(one.report["plan"])) + len(layout.think)
        key = np.array([stream_key(ask.seed, ask.id, one.sample)], dtype=np.uint64)
        u = uniforms(key, np.array([at - opened], dtype=np.uint64))[0]
        return float(((z / ask.temperature).softmax(-1).cumsum(-1) - u).abs().min())

    def _request(self, ask: Ask) -> Request:
        same = {k: v for k, v in vars(ask).items() if k not in ("id", "prompt", "join", "cancel_after")}
        return Request(ask.id, tuple(self.codec.encode_prompt(ask.prompt)), **same)


class _Token(int):
    """An id that remembers who chose it."""

    sampled: bool


def completion(codec: Codec, chunks: Sequence[Chunk], trace: Trace, cancelled: bool = False) -> Completion:
    """What arrived as a Completion: think tokens are counted by splitting the streamed ids again at the tags."""
    layout = codec.layout
    splitter = token_splitter(layout, bare=not layout.answer)
    tokens = []
    for chunk in chunks:
        tokens.append(_Token(chunk.token))
        tokens[-1].sampled = chunk.role == "sampled"
    certain = splitter.feed(tokens)
    # Held tokens of a begun end tag are thought only once the model leaves the tag; a cancelled one never did.
    counted = sum(t.sampled for piece in certain if piece.place == "think" for t in piece.data)
    pieces = certain + splitter.close()
    think, answer = (tuple(t for p in pieces if p.place == place for t in p.data) for place in ("think", "answer"))
    ended = splitter.place == "outside" or (splitter.place == "answer" and tokens[-1] in layout.eos)
    answer = answer[:-1] if answer and answer[-1] in layout.eos else answer
    fields = [tuple(c.token for c in chunks if c.region == region) for region in ("think", "answer")]
    misplaced = _misplaced(layout, fields[0], think, fields[1], answer)
    differs = ""
    if tuple(c.token for c in chunks) != trace.ids:
        differs = f"{len(chunks)} tokens streamed, {len(trace.ids)} recorded, or others"
    elif (trace.think_ids, trace.answer_ids) != (think, answer):
        differs = "the record draws the line between thought and answer elsewhere"
    return Completion(
        trace.id,
        trace.sample,
        counted,
        codec.decode(think),
        codec.decode(answer),
        closed=bool(chunks) and ended,
        misplaced=misplaced,
        cancelled=cancelled,
        report=trace.report(),
        differs=differs,
        tokens=tuple(map(int, tokens)),
    )


def _misplaced(
    layout: Layout,
    think_field: Ids,
    think: Ids,
    answer_field: Ids,
    answer: Ids,
) -> int:
    """Tags inside the two streamed fields, or else tokens that the tags put into the other one."""
    ends = (layout.end_think, *layout.end_think_also)
    think_field, answer_field = _without(think_field, ends), _without(answer_field, (layout.end_answer,))
    strays = _count(think_field, ends) + _count(answer_field, (layout.think, *ends, layout.answer, layout.end_answer))
    return strays or _apart(think_field, think) + _apart(answer_field, answer)


def _without(ids: Ids, tags: Iterable[Ids]) -> Ids:
    """`ids` without the tag that they end with."""
    longest = max((len(tag) for tag in tags if ids[-len(tag) :] == tag), default=0)
    return ids[: len(ids) - longest]


def _count(ids: Ids, tags: Iterable[Ids]) -> int:
    return sum(ids[i : i + len(tag)] == tag for tag in tags if tag for i in range(len(ids)))


def _apart(one: Ids, other: Ids) -> int:
    """Tokens behind the common beginning of two sequences, in the longer one."""
    same = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    return max(len(one), len(other)) - same
