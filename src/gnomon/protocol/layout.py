"""Which ids are tags: what the engine, the controller and the splitter know of a tokenizer. Plain integers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gnomon.base.errors import TagError, unknown


class TagTokenizer(Protocol):
    """What `Layout.atomic` reads of our own tokenizer (gnomon.data.tokenizer)."""

    bos: int
    eos: int
    pad: int
    think: int
    end_think: int
    answer: int
    end_answer: int
    plan: dict[str, int]
    kinds: dict[str, int]
    parent: int


@dataclass(frozen=True)
class Layout:
    """Tags as id sequences of one or several tokens.

    think, end_think, answer, end_answer: the tags (foreign bases: the ids of their text; `answer` may be empty).
    plans: strategy -> ids forced in front of the think tag. eos: ids that end the sequence. pad: fills rows.
    boundary: ids that begin a node (KIND tokens) or the newline between nodes (text mode).
    end_think_also: other spellings that close the block. transition: forced before the end tag at a cut.
    empty_plans: strategies whose block the engine closes at once. banned: ids that are never sampled.
    atomic_nodes: `boundary` ids begin a node; otherwise they end one. structure: ids that belong to a thought alone and
    are masked in an answer (a model that was cut would think on there).
    """

    think: tuple[int, ...]
    end_think: tuple[int, ...]
    answer: tuple[int, ...]
    end_answer: tuple[int, ...]
    plans: Mapping[str, tuple[int, ...]]
    eos: tuple[int, ...]
    pad: int
    boundary: frozenset[int] = frozenset()
    end_think_also: tuple[tuple[int, ...], ...] = ()
    transition: tuple[int, ...] = ()
    empty_plans: frozenset[str] = frozenset()
    banned: frozenset[int] = field(default=frozenset())
    atomic_nodes: bool = False
    structure: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("think", "end_think", "end_answer"):
            if not getattr(self, name):
                raise TagError(f"the tag {name!r} has no ids; the tokenizer must give it at least one token")
        if not self.eos:
            raise TagError("no end-of-sequence id: give the layout at least one in `eos`, or answers could never end")
        if not self.plans:
            raise TagError("a layout needs at least one strategy in `plans`; its ids may be empty")
        for end in (self.end_think, *self.end_think_also):
            if any(self.end_answer[i : i + len(end)] == end for i in range(len(self.end_answer))):
                raise TagError(
                    f"the end of the answer {self.end_answer!r} contains the end of the thought {end!r}, which is "
                    "masked in an answer: it could never be closed; use other tags"
                )
        stray = self.empty_plans - set(self.plans)
        if stray:
            raise unknown("strategy", sorted(stray)[0], self.plans)

    @classmethod
    def atomic(cls, tok: TagTokenizer) -> Layout:
        """The layout of our own tokenizer: every tag is one token, KIND tokens are the boundaries."""
        return cls(
            think=(tok.think,),
            end_think=(tok.end_think,),
            answer=(tok.answer,),
            end_answer=(tok.end_answer,),
            plans={name: (ident,) for name, ident in tok.plan.items()},
            eos=(tok.eos,),
            pad=tok.pad,
            boundary=frozenset(tok.kinds.values()),
            banned=frozenset((tok.bos, tok.pad)),
            atomic_nodes=True,
            structure=frozenset((*tok.kinds.values(), tok.parent)),
        )

    def plan_ids(self, plan: str) -> tuple[int, ...]:
        """Ids forced for `plan`. Raises UnknownNameError with the nearest strategy."""
        if plan not in self.plans:
            raise unknown("plan", plan, self.plans)
        return self.plans[plan]

    @property
    def overhead(self) -> int:
        """Positions that tags and transition take in the longest case."""
        plans = max(len(ids) for ids in self.plans.values())
        ends = max(len(ids) for ids in (self.end_think, *self.end_think_also))
        return plans + len(self.think) + len(self.transition) + ends + len(self.answer) + len(self.end_answer)

    def masked(self, inside: bool) -> frozenset[int]:
        """Single ids that are never sampled inside the think block, or in the answer."""
        tags = [self.think, self.answer, *self.plans.values()]
        tags += [self.end_answer] if inside else [self.end_think, *self.end_think_also]
        wanted = (self.end_think, *self.end_think_also) if inside else (self.end_answer,)
        tags += [] if inside else [(ident,) for ident in self.structure]
        shared = {*self.banned, self.pad, *(ids[0] for ids in tags if len(ids) == 1)}
        return frozenset(shared - set(self.eos) - {i for ids in wanted for i in ids})
