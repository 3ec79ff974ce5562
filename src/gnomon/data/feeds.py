"""Endless records from one source, block by block, with a place that fits in a line of JSON.

A block is the next `shuffle` rows, drawn in a hashed order. Its beginning and the number drawn say everything: a
restored feed reads the block again and drops what was drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from gnomon.base import seeds
from gnomon.base.errors import DataError
from gnomon.data.encode import Encoded
from gnomon.data.ingest import BadRow, Quarantine, Raw, Tally
from gnomon.data.readers import Reader
from gnomon.data.rows import Form, Sample, encode_sample
from gnomon.data.tokenizer import Tokenizer

IN_ORDER: Final = 256  # rows of a block that is given as it stands
BLOCK_CHARS: Final = 16 * 2**20  # a block of long rows is shorter


@dataclass(frozen=True)
class Drawn:
    """A record, its natural length in ids (larger where it was shortened), and where it came from."""

    record: Encoded
    size: int
    file: str
    row: int


class Stream(Protocol):
    """Endless records with a place."""

    name: str

    def draw(self, room: int | None) -> Drawn:
        """The next record; room: shorten it to so many ids where it can be."""

    def state(self) -> dict[str, Any]:
        """The place in front of the next record, JSON-able."""

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go to a place; None is the start."""

    def fingerprint(self) -> str:
        """Changes when the data does."""

    def counts(self) -> dict[str, float]:
        """Of everything read up to here."""

    def close(self) -> None:
        """Release files."""


class Indexed:
    """Records that are a pure function of their number: the built-in mixture, say."""

    def __init__(self, name: str, record: Callable[[int], Encoded], fingerprint: str) -> None:
        self.name, self._record, self._print, self._next = name, record, fingerprint, 0

    def draw(self, room: int | None) -> Drawn:
        self._next += 1
        found = self._record(self._next - 1)
        return Drawn(found, len(found.ids), self.name, self._next)

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        self._next = int(state["next"]) if state else 0

    def fingerprint(self) -> str:
        return self._print

    def counts(self) -> dict[str, float]:
        return {"used": self._next}

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Place:
    """Where a block begins: pass, file (of the pass's order), place in the file, number of the block, counts so far."""

    epoch: int = 0
    file: int = 0
    at: Mapping[str, Any] | None = None
    block: int = 0
    used: int = 0
    escaped: int = 0
    quarantined: int = 0
    before: int = 0  # rows used before this pass

    @property
    def tally(self) -> Tally:
        return Tally(self.used, self.escaped, self.quarantined)


@dataclass(frozen=True)
class Reading:
    """How a feed reads. shuffle: rows of a block, 0 = in order. cut: see `encode_sample`."""

    form: Form
    seed: str
    shuffle: int = 1000
    cut: float = 0.0
    bad_share: float = 0.01


class Feed:
    """Records of files (or of one streamed data set) one after the other, again and again."""

    def __init__(
        self, name: str, readers: Sequence[Reader], tok: Tokenizer, reading: Reading, quarantine: Quarantine
    ) -> None:
        self.name, self.readers, self.tok, self.reading, self.quarantine = name, readers, tok, reading, quarantine
        self._names = [r.name for r in readers]
        self._open: Reader | None = None
        self._block: list[tuple[str, int, int, Sample]] = []  # file, row, part of the row
        self.restore(None)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        values = dict(state or {})
        if values.pop("files", self._names) != self._names:
            values = {}  # another list of files: its places mean nothing here
        self._drawn = int(values.pop("drawn", 0))
        if values.pop("shuffle", self.reading.shuffle) != self.reading.shuffle:
            self._drawn = 0  # other blocks: this one is given again from its beginning
        self._begin = self._next = Place(**values)
        self._block = []
        self._release()
        if self._drawn:
            drawn = self._drawn
            self._load()
            if drawn > len(self._block):
                raise DataError(
                    f"{self.name}: the run had drawn {drawn} records of a block that now holds {len(self._block)}; the "
                    "data has changed"
                )
            self._drawn = drawn

    def state(self) -> dict[str, Any]:
        if self._drawn == len(self._block):  # the next block has not been read yet
            return {**asdict(self._next), "drawn": 0, "shuffle": self.reading.shuffle, "files": self._names}
        place = asdict(self._begin)
        return {**place, "drawn": self._drawn, "shuffle": self.reading.shuffle, "files": self._names}

    @property
    def epoch(self) -> int:
        """Passes that are complete when this one is."""
        return self._begin.epoch

    def counts(self) -> dict[str, float]:
        tally = self._next.tally
        return {"used": tally.used, "escaped": tally.escaped, "quarantined": tally.quarantined, "epoch": self.epoch}

    def draw(self, room: int | None) -> Drawn:
        file, row, part, sample = self.next_sample()
        how = self.reading
        rng = seeds.rng("cut", how.seed, self.name, self.epoch, file, row, part) if how.cut else None
        record, size = encode_sample(self.tok, sample, cut=how.cut, rng=rng, room=room)
        return Drawn(record, size, file, row)

    def next_sample(self) -> tuple[str, int, int, Sample]:
        """(file, row, part of the row, what it holds) of the next record."""
        while self._drawn == len(self._block):
            self._load()
        self._drawn += 1
        return self._block[self._drawn - 1]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.readers)))
        if epoch and self.reading.shuffle:
            seeds.rng("files", self.reading.seed, self.name, epoch).shuffle(order)
        return order

    def _load(self) -> None:
        """Read the next block: at most `shuffle` rows of one pass."""
        how, place = self.reading, self._next
        self._begin, self._drawn, self._block = place, 0, []
        rng = seeds.rng("block", how.seed, self.name, place.epoch, place.block)
        limit = how.shuffle or IN_ORDER
        if place.epoch and not place.block:
            limit = rng.randint(1, limit)  # later passes group the rows in another way
        order, tally, chars, rows = self._order(place.epoch), place.tally, 0, 0
        file, end = place.file, False
        while rows < limit and chars < BLOCK_CHARS:
            reader = self._reader(order[file], place if file == place.file else None)
            try:
                raw = next(reader)
            except StopIteration:
                self._release()
                file += 1
                if file == len(order):
                    end = True
                    break
                continue
            samples, tally = self._judge(reader.name, raw, tally)
            self._block += [(reader.name, raw.number, part, s) for part, s in enumerate(samples)]
            rows += 1
            chars += sum(s.size for s in samples)
        if end:
            self._check_pass(tally.used - place.before)
            self._next = Place(place.epoch + 1, **asdict(tally), before=tally.used)
        else:
            at = self._open.where() if self._open else None
            self._next = Place(place.epoch, file, at, place.block + 1, **asdict(tally), before=place.before)
        if how.shuffle:
            rng.shuffle(self._block)

    def _judge(self, file: str, raw: Raw, tally: Tally) -> tuple[list[Sample], Tally]:
        """The records of a row; a bad one is counted, named, and stops everything when there are too many."""
        try:
            if raw.reason is not None:
                raise BadRow(raw.reason)
            samples, tags = self.reading.form.samples(raw.value)
            tally = Tally(tally.used + 1, tally.escaped + tags, tally.quarantined)
        except BadRow as error:
            samples = []
            self.quarantine.add(file, raw, str(error))
            tally = Tally(tally.used, tally.escaped, tally.quarantined + 1)
        tally.check(self.reading.bad_share, f"{self.name}, {file} row {raw.number}", self.quarantine.reasons)
        return samples, tally

    def _check_pass(self, used: int) -> None:
        if not used:
            why = "; ".join(f"{n} × {reason}" for reason, n in self.quarantine.reasons.most_common(3))
            raise DataError(f"{self.name} holds no usable row ({why or 'it is empty'})")

    def _reader(self, index: int, place: Place | None) -> Reader:
        """The open reader; opened at the place, or at its start, when it is not."""
        reader = self.readers[index]
        if self._open is not reader:
            self._release()
            reader.seek(place.at if place is not None else None)
            self._open = reader
        return reader

    def _release(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def fingerprint(self) -> str:
        return hashlib.blake2b("".join(r.fingerprint() for r in self.readers).encode(), digest_size=16).hexdigest()

    def close(self) -> None:
        self._release()
        self.quarantine.close()
