"""Does a base model decode soundly here, seen from outside? The black-box test that a user runs on their own base
(`gnomon check backbone`).

The engine believes that a row in a slot is what the model's plain forward pass gives, whatever stands beside it,
however it was cut and wherever it was moved; that taps are the hidden states; that tags and end of sequence are ids the
model can write. Every check measures how far that is off. `GROUPS` is the list: a function per group, name -> Finding.
Legend: R rows, T tokens of a row, V vocabulary, L blocks, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.errors import ConfigError
from gnomon.conformance import acting
from gnomon.data.codec import Codec
from gnomon.data.foreign import TextCodec
from gnomon.decoding.room import RESERVE_FLOOR
from gnomon.model.backbone import Backbone, OwnBackbone
from gnomon.protocol import tags
from gnomon.protocol.match import matcher
from gnomon.reasoner import Reasoner

Ids = tuple[int, ...]
MEANING: Final[dict[str, str]] = {
    "plain": "logits of rows in slots against the plain forward pass, in standard deviations",
    "pieces": "a row fed in pieces against the row at once, in standard deviations",
    "copied": "a row behind a copied and moved beginning against the row at once, in standard deviations",
    "alone": "log-probs of a row in a batch against the row alone",
    "order": "log-probs of a row among others, in another order and beside longer ones",
    "taps": "taps that are missing, of another shape or not finite",
    "states": "taps against output_hidden_states of the plain pass, in standard deviations",
    "left_padding": "plain passes padded at the left against the row alone, in standard deviations",
    "padding_side": "a tokenizer that pads at the right",
    "end_of_sequence": "end ids that are missing or outside the vocabulary",
    "tags": "tags that do not read back, or whose end merges with a neighbour unseen",
    "context": "a row that fills the context (up to 512 positions) against the plain pass, in standard deviations",
    "room": "positions that an empty question, its tags and the answer reserve take",
    **acting.MEANING,
}
LONGEST: Final = 512  # positions that are tried; a pass over a whole long context takes minutes on a CPU
ROW: Final = 48  # tokens of the longest of the random rows
SAME: Final = 1e-4  # log-probs of one row in other company (decisions.md §7)
OFF: Final = 1e-3  # standard deviations between two ways to compute the same logits in float32
LOW_SAME: Final = 0.25  # half precisions round every state
_BATCH: Final = 4
_NEIGHBOURS: Final = ("5", ".", " ", "\n", ")", "a", "=")


@dataclass(frozen=True)
class Finding:
    """worst: the greatest error or count that was seen; allowed: up to where it is sound. note: what to know."""

    worst: float
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.worst <= self.allowed  # NaN is never sound

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "worst": self.worst,
            "allowed": self.allowed,
            **({"note": self.note} if self.note else {}),
        }


@dataclass(frozen=True)
class BackboneReport:
    """What `gnomon check backbone` prints. family: model_type of the base; notes: what was put right when loading."""

    family: str
    backbone: str
    context: int
    rows: int
    checks: Mapping[str, Finding]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(found.ok for found in self.checks.values())

    def to_json(self) -> dict[str, Any]:
        checks = {name: found.to_json() for name, found in self.checks.items()}
        return {**vars(self), "notes": list(self.notes), "checks": checks, "ok": self.ok}


@dataclass(frozen=True)
class Subject:
    """What is checked. module: the model as transformers sees it, whose plain forward pass is the measure.

    batches: random ragged rows. exact, close: allowed differences in company (log-probs), and between two ways to
    compute the same logits (standard deviations).
    """

    backbone: Backbone
    codec: Codec
    module: Any
    batches: tuple[tuple[Ids, ...], ...]
    exact: float
    close: float

    @torch.inference_mode()
    def plain(self, row: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and last-token states [L, C] of one forward pass over the whole row, no cache."""
        ids = torch.tensor([list(row)], device=self.backbone.device)
        out = self.module(input_ids=ids, output_hidden_states=True, use_cache=False)
        return out.logits[0].float(), torch.stack([s[0, -1].float() for s in out.hidden_states[1:]])

    def used_cache(self, slots: int, capacity: int) -> Any:
        """Empty slots in which other rows stood before; nothing of them may be seen."""
        cache = self.backbone.new_cache(slots, capacity)
        self.backbone.extend(cache, [[r % self.backbone.vocab_size] * capacity for r in range(slots)], logits="none")
        for slot in range(slots):
            cache.cut(slot)
        return cache

    def last(self, rows: Sequence[Ids]) -> Tensor:
        """Logits [R, V] behind each row, all of them in one pass in fresh slots."""
        cache = self.backbone.new_cache(len(rows), max(map(len, rows)))
        out = self.backbone.extend(cache, rows)
        assert out.logits is not None
        return out.logits


def check_backbone(
    reasoner: Reasoner, n: int = 16, seed: str = "check", on_done: Callable[[int], object] | None = None
) -> BackboneReport:
    """Measure every group of checks on `n` random rows. on_done(1): one more group is done.

    Raises ConfigError for n < 2: company needs a neighbour.
    """
    if n < 2:
        raise ConfigError(f"n = {n}; give at least 2 rows, a row is compared with itself beside another")
    subject = _subject(reasoner, n, seed)
    found: dict[str, Finding] = {}
    for group in GROUPS:
        found.update(group(subject))
        if on_done is not None:
            on_done(1)
    codec = reasoner.codec
    notes = codec.notes if isinstance(codec, TextCodec) else ()
    family = str(subject.module.config.model_type)
    return BackboneReport(family, type(reasoner.backbone).__name__, reasoner.backbone.context, n, found, notes)


def _subject(reasoner: Reasoner, n: int, seed: str) -> Subject:
    backbone = reasoner.backbone
    longest = max(2, min(ROW, backbone.context))
    rows = []
    for i in range(n):
        # Every batch has a row of one token and one of the greatest length: both ends of raggedness.
        length = (1, longest)[i % _BATCH] if i % _BATCH < 2 else seeds.rng("backbone", seed, i).randint(2, longest)
        rows.append(_draw(backbone.vocab_size, length, seed, i))
    batches = [tuple(rows[at : at + _BATCH]) for at in range(0, n, _BATCH)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    module = _module(backbone)
    low = next(module.parameters()).dtype not in (torch.float32, torch.float64)
    exact, close = (LOW_SAME, LOW_SAME) if low else (SAME, OFF)
    return Subject(backbone, reasoner.codec, module, tuple(batches), exact, close)


def _draw(vocab: int, length: int, *name: object) -> Ids:
    generator = seeds.torch_generator("backbone ids", *name)
    return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())


def _module(backbone: Backbone) -> Any:
    """The transformers model behind a backbone; our own decoder in its transformers coat."""
    module = backbone.module  # type: ignore[attr-defined]
    if not isinstance(backbone, OwnBackbone):
        return module
    from gnomon.model.hf import GnomonConfig, GnomonForCausalLM

    with seeds.undisturbed():
        coat = GnomonForCausalLM(GnomonConfig(**module.config.model_dump()))
    coat.decoder = module
    return coat.eval()


def _far(got: Tensor, wanted: Tensor) -> float:
    """Greatest difference in standard deviations of `wanted`."""
    return _gap(got, wanted) / max(float(wanted.std()), 1e-30)


def _gap(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return math.inf
    return float((got - wanted).abs().max())


def _log_gap(got: Tensor, wanted: Tensor) -> float:
    return _gap(got.log_softmax(-1), wanted.log_softmax(-1))


def _worst(values: Iterator[float] | Sequence[float]) -> float:
    """The greatest; NaN where there is one, which `max` may lose."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


# -- groups ---------------------------------------------------------------------------------------------------------
def slots(subject: Subject) -> dict[str, Finding]:
    """Rows in slots that held others before: all positions at once, in pieces, behind a copied beginning."""
    plain, pieces, copied = [], [], []
    net = subject.backbone
    for batch in subject.batches:
        longest = max(map(len, batch))
        wanted = [subject.plain(row)[0] for row in batch]
        out = net.extend(subject.used_cache(len(batch), longest), batch, logits="all").logits
        assert out is not None
        at_once = out.split([len(row) for row in batch])
        plain += [_far(got, want) for got, want in zip(at_once, wanted, strict=True)]
        pieces += list(_in_pieces(subject, batch, at_once))
        copied.append(_copied(subject, max(batch, key=len)))
    return {
        "plain": Finding(_worst(plain), subject.close),
        "pieces": Finding(_worst(pieces), subject.close),
        "copied": Finding(_worst(copied), subject.close),
    }


def _in_pieces(subject: Subject, batch: Sequence[Ids], at_once: Sequence[Tensor]) -> Iterator[float]:
    """Every row in three pieces of at least one token; shorter rows come last and alone in the batch."""
    rows = sorted((i for i, row in enumerate(batch) if len(row) >= 3), key=lambda i: -len(batch[i]))
    if not rows:
        return
    cuts = {i: (1 + (5 * i) % (len(batch[i]) - 2), len(batch[i]) - 1) for i in rows}
    cache = subject.used_cache(len(rows), max(len(batch[i]) for i in rows))
    parts = [(0, cuts[i][0], cuts[i][1], len(batch[i])) for i in rows]
    for k in range(3):
        fed = [batch[i][p[k] : p[k + 1]] for i, p in zip(rows, parts, strict=True)]
        out = subject.backbone.extend(cache, fed, logits="all").logits
        assert out is not None
        for got, i, p in zip(out.split([len(f) for f in fed]), rows, parts, strict=True):
            yield _far(got, at_once[i][p[k] : p[k + 1]])


def _copied(subject: Subject, row: Ids) -> float:
    """A beginning computed once, copied into a slot, moved into another one and gone on with."""
    if len(row) < 2:
        return 0.0
    half = len(row) // 2
    cache = subject.used_cache(3, len(row))
    subject.backbone.extend(cache, [row[: half + 1]], 0, logits="none")
    cache.copy(0, 2, half)
    cache.move(2, 1)
    out = subject.backbone.extend(cache, [row[half:]], 1).logits
    assert out is not None
    return _far(out[0], subject.last([row])[0])


def company(subject: Subject) -> dict[str, Finding]:
    """A row beside others, in either order, beside longer and shorter ones, against the row alone."""
    beside: list[float] = []
    order: list[float] = []
    net = subject.backbone
    long = _draw(net.vocab_size, max(2, min(ROW + 16, net.context)), "beside")
    for batch in subject.batches:
        alone = [subject.last([row])[0] for row in batch]
        ways = (batch, (*batch[::-1], long), tuple(x for row in batch for x in (long[: 1 + len(row) // 3], row)))
        places = (range(len(batch)), range(len(batch) - 1, -1, -1), range(1, 2 * len(batch), 2))
        for into, way, place in zip((beside, order, order), ways, places, strict=True):
            got = subject.last(way)
            into += [_log_gap(got[at], want) for at, want in zip(place, alone, strict=True)]
    return {"alone": Finding(_worst(beside), subject.exact), "order": Finding(_worst(order), subject.exact)}


def taps(subject: Subject) -> dict[str, Finding]:
    """Last-token states of every block: there, finite, [R, L, C], and those of the plain forward pass."""
    net, bad, far = subject.backbone, 0, []
    for batch in subject.batches:
        cache = net.new_cache(len(batch), max(map(len, batch)))
        found = net.extend(cache, batch, taps=True).taps
        if found is None or found.shape != (len(batch), net.n_layers, net.hidden_size):
            bad += len(batch)
            continue
        bad += int((~torch.isfinite(found)).sum())
        for got, row in zip(found, batch, strict=True):
            wanted = subject.plain(row)[1]
            same = got.shape == wanted.shape
            far.append(_worst([_far(g, w) for g, w in zip(got, wanted, strict=True)]) if same else math.inf)
    return {"taps": Finding(bad, 0), "states": Finding(_worst(far or [math.inf]), subject.close)}


@torch.inference_mode()
def padding(subject: Subject) -> dict[str, Finding]:
    """What plain `generate` does with a batch: padded at the left, padding masked, positions counted from the text."""
    far = []
    device = subject.backbone.device
    for batch in subject.batches:
        width = max(map(len, batch))
        ids = torch.tensor([[subject.codec.layout.pad] * (width - len(r)) + list(r) for r in batch], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch], device=device)
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        out = subject.module(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        for got, row in zip(out.logits[:, -1].float(), batch, strict=True):
            far.append(_far(got, subject.plain(row)[0][-1]))
    codec = subject.codec
    side = codec.tokenizer.padding_side if isinstance(codec, TextCodec) else "left"
    put_right = [n for n in codec.notes if "padding_side" in n] if isinstance(codec, TextCodec) else []
    return {
        "left_padding": Finding(_worst(far), subject.close),
        "padding_side": Finding(int(side != "left"), 0, "; ".join(put_right)),
    }


def ids(subject: Subject) -> dict[str, Finding]:
    """End of sequence and tags as ids that the model can write and the engine can read."""
    layout, vocab = subject.codec.layout, subject.backbone.vocab_size
    outside = [i for i in layout.eos if not 0 <= i < vocab]
    spelled = ((layout.think, tags.THINK), (layout.end_think, tags.END_THINK), (layout.answer, tags.ANSWER),
               (layout.end_answer, tags.END_ANSWER))  # fmt: skip
    wrong = [name for tag, name in spelled if any(i >= vocab for i in tag) or not _reads_back(subject.codec, tag, name)]
    merged = list(_unseen(subject.codec))
    told = [f"{name} does not read back" for name in wrong] + [f"unseen in {text!r}" for text in merged[:4]]
    length = f"{len(layout.end_think)} tokens end a thought"
    return {
        "end_of_sequence": Finding(len(outside) + (not layout.eos), 0, f"ids {list(layout.eos)}"),
        "tags": Finding(len(wrong) + len(merged), 0, "; ".join([length, *told])),
    }


def _reads_back(codec: Codec, tag: Ids, name: str) -> bool:
    """Whether ids of a tag show its text, and, where tags are atoms, whether typed text never becomes one."""
    if isinstance(codec, TextCodec):
        text = str(codec.tokenizer.decode(list(tag), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return text.strip() == name
    return len(tag) == 1 and tag[0] not in codec.encode_prompt(name)


def _unseen(codec: Codec) -> Iterator[str]:
    """Texts in which the end of a thought is spelt with ids that the controller does not match."""
    if not isinstance(codec, TextCodec):
        return  # one token, never made of text
    layout = codec.layout
    rule = matcher(layout.end_think, *layout.end_think_also)
    for before in _NEIGHBOURS:
        for behind in ("", "\n", "\n" + tags.ANSWER):
            text, state, seen = before + tags.END_THINK + behind, 0, False
            for token in codec.tokenizer.encode(text, add_special_tokens=False):
                state = rule.step(state, token)
                seen = seen or rule.hit[state] is not None
            if not seen:
                yield text


def context(subject: Subject) -> dict[str, Finding]:
    """The far end of the context, as far as it can be tried, and whether a question fits at all."""
    net, layout = subject.backbone, subject.codec.layout
    length = min(net.context, LONGEST)
    row = _draw(net.vocab_size, length, "context")
    off = _far(subject.last([row])[0], subject.plain(row)[0][-1])
    need = len(subject.codec.encode_prompt("")) + layout.overhead + RESERVE_FLOOR
    return {
        "context": Finding(off, subject.close, f"{net.context} positions, {length} tried"),
        "room": Finding(need, net.context),
    }


def steering(subject: Subject) -> dict[str, Finding]:
    """A metacognitive layer that acts on this base."""
    worst = acting.steered(subject.backbone, subject.batches[0])
    return {name: Finding(value, subject.close if name == "trained" else 0.0) for name, value in worst.items()}


Group = Callable[[Subject], Mapping[str, Finding]]
GROUPS: Final[tuple[Group, ...]] = (slots, company, taps, padding, ids, context, steering)
