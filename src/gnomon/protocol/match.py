"""Matching a few short sequences (tags) in a stream of symbols, one symbol at a time, without ever looking back.

An Aho-Corasick automaton over any hashable symbols: characters for text, integers for token ids. One step costs a
few dictionary look-ups, bounded by the length of the longest tag and independent of the length of the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from functools import lru_cache

from gnomon.base.errors import TagError


class Matcher:
    """The automaton. A state is an integer; 0 is the root.

    depth[s]  symbols held back in state s: the longest suffix of the stream that begins some tag
    hit[s]    (tag index, tag length) when a tag ends in state s, else None; the longest one
    rest[s]   the symbols that complete the tag begun in s (the first listed tag through s)
    enders[s] symbols that complete a tag from s
    """

    __slots__ = ("_fail", "_go", "depth", "enders", "hit", "rest")

    def __init__(self, tags: Sequence[Sequence[Hashable]]) -> None:
        if not tags or any(len(tag) == 0 for tag in tags):
            raise TagError(f"a tag needs at least one token or character; given {list(tags)!r}")
        self._go: list[dict[Hashable, int]] = [{}]
        self._fail: list[int] = [0]
        self.depth: list[int] = [0]
        self.hit: list[tuple[int, int] | None] = [None]
        self.rest: list[tuple[Hashable, ...]] = [tuple(tags[0])]
        for index, tag in enumerate(tags):
            self._add(index, tuple(tag))
        self._link()
        self.enders: list[tuple[Hashable, ...]] = [self._enders(s) for s in range(len(self._go))]

    def _add(self, index: int, tag: tuple[Hashable, ...]) -> None:
        state = 0
        for at, symbol in enumerate(tag):
            if symbol not in self._go[state]:
                self._go[state][symbol] = len(self._go)
                self._go.append({})
                self._fail.append(0)
                self.depth.append(at + 1)
                self.hit.append(None)
                self.rest.append(tag[at + 1 :])
            state = self._go[state][symbol]
        if self.hit[state] is None:
            self.hit[state] = (index, len(tag))

    def _link(self) -> None:
        queue = deque(self._go[0].values())
        while queue:
            state = queue.popleft()
            if self.hit[state] is None:
                self.hit[state] = self.hit[self._fail[state]]
            for symbol, child in self._go[state].items():
                self._fail[child] = self.step(self._fail[state], symbol)
                queue.append(child)

    def _enders(self, state: int) -> tuple[Hashable, ...]:
        symbols: dict[Hashable, None] = {}
        at = state
        while True:
            symbols.update(dict.fromkeys(self._go[at]))
            if at == 0:
                break
            at = self._fail[at]
        return tuple(s for s in symbols if self.hit[self.step(state, s)] is not None)

    def step(self, state: int, symbol: Hashable) -> int:
        """The state after one more symbol."""
        go, fail = self._go, self._fail
        while state and symbol not in go[state]:
            state = fail[state]
        return go[state].get(symbol, 0)


@lru_cache(maxsize=256)
def matcher(*tags: tuple[Hashable, ...] | str) -> Matcher:
    """The (shared, immutable) automaton of these tags."""
    return Matcher(tags)
