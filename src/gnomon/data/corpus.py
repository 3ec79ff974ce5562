"""Packed token bins: records on disk as flat memory-mapped arrays, and rows of several records for training.

A bin is three files: `<split>.bin` (uint16 ids), `<split>.loss` (uint8, 1 = predicting this id is trained) and
`<split>.idx` (int64 record offsets, one more than records). Legend: R rows, T row length.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.errors import DataError
from gnomon.data.encode import Encoded

OPEN_ROWS = 16


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Whole records behind one another. ids int32 [n], loss uint8 [n] (1 = predicting this id is trained), sizes: the
    records' lengths, which sum to n."""

    ids: NDArray[np.int32]
    loss: NDArray[np.uint8]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, records: Sequence[Encoded]) -> PackedRow:
        """From encoded records, in order."""
        ids = np.asarray([i for r in records for i in r.ids], dtype=np.int32)
        loss = np.asarray([m for r in records for m in r.loss], dtype=np.uint8)
        return cls(ids, loss, tuple(len(r.ids) for r in records))

    @property
    def targets(self) -> int:
        """Trained predictions: marked ids that have an id of their own record in front of them."""
        firsts = np.cumsum((0, *self.sizes[:-1]))
        return int(self.loss.sum()) - int(self.loss[firsts].sum())


@dataclass(frozen=True)
class StepData:
    """What one optimiser step sees, on all processes together: packed rows of at most `length` ids.

    cursor: where the source stands behind this step, JSON-able; `Source.seek` takes it back. counts: of this step, for
    the metrics (`data/…`).
    """

    rows: tuple[PackedRow, ...]
    length: int
    cursor: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def targets(self) -> int:
        """Trained predictions of the whole step: what its loss is a mean over."""
        return sum(row.targets for row in self.rows)


class Source(Protocol):
    """Data of a run. Every process asks for the same steps and gets the same rows; each then takes its share."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data does."""

    def step(self, number: int) -> StepData:
        """Data of step `number`. Numbers rise; what lies between two asked ones is passed over.

        Raises DataError when there is nothing, or when the data has changed or broken since it was opened.
        """

    def seek(self, number: int, cursor: Mapping[str, Any]) -> None:
        """Go to where step `number` - 1 left this source; its cursor is given. Later and earlier steps both work."""

    def close(self) -> None:
        """Release files and threads."""


def write_bin(folder: Path, split: str, records: Iterable[Encoded], meta: dict[str, object]) -> int:
    """Write records in order; returns how many. `meta.json` says how they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    offsets = [0]
    with (folder / f"{split}.bin").open("wb") as ids, (folder / f"{split}.loss").open("wb") as loss:
        for number, record in enumerate(records):
            if len(record.ids) != len(record.loss) or max(record.ids) >= 2**16:
                raise DataError(f"record {number}: ids and loss mask differ in length, or an id exceeds 65,535.")
            ids.write(np.asarray(record.ids, dtype=np.uint16).tobytes())
            loss.write(np.asarray(record.loss, dtype=np.uint8).tobytes())
            offsets.append(offsets[-1] + len(record.ids))
    (folder / f"{split}.idx").write_bytes(np.asarray(offsets, dtype=np.int64).tobytes())
    (folder / f"{split}.json").write_text(json.dumps({**meta, "records": len(offsets) - 1, "tokens": offsets[-1]}))
    return len(offsets) - 1


@dataclass(frozen=True)
class Batch:
    """R packed rows: ids, targets (-100 = no loss), positions, segments int64 [R, T] (0 = padding, else number of the
    record in its row). A record begins wherever a position is 0."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor
    tokens: int

    @property
    def mask(self) -> Tensor:
        """Who sees whom, bool [R, 1, T, T]: every record itself alone, causally; padding sees padding."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril()).unsqueeze(1)


class Bins:
    """Memory-mapped records of one split."""

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.split = Path(folder), split
        paths = {kind: self.folder / f"{split}.{kind}" for kind in ("bin", "loss", "idx")}
        missing = [str(p) for p in paths.values() if not p.is_file()]
        if missing:
            raise DataError(f"no packed data: {', '.join(missing)} missing; write it with `gnomon data prepare`.")
        sizes = (paths["bin"].stat().st_size / 2, paths["loss"].stat().st_size)
        self.offsets = np.fromfile(paths["idx"], dtype=np.int64)
        end = int(self.offsets[-1]) if len(self.offsets) else 0
        if len(self.offsets) < 2 or sizes != (end, end) or self.offsets[0] or (np.diff(self.offsets) < 1).any():
            raise DataError(
                f"{paths['bin']} holds {sizes[0]:g} ids and {sizes[1]} loss marks but its index of "
                f"{len(self.offsets)} numbers ends at {end}; the data is incomplete: write it again with "
                "`gnomon data prepare`."
            )
        self._files = tuple(paths[kind].open("rb") for kind in ("bin", "loss"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Ids of all records."""
        return int(self.offsets[-1])

    def arrays(self, index: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """ids and loss marks of a record. Read, not mapped: a file that shrinks is an error, not a dead process."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        raw = os.pread(self._files[0].fileno(), 2 * (end - start), 2 * start)
        marks = os.pread(self._files[1].fileno(), end - start, start)
        if len(raw) != 2 * (end - start) or len(marks) != end - start:
            raise DataError(
                f"{self.folder}/{self.split}.bin or .loss ends inside record {index}: the file became shorter while it "
                "was read; write the data again with `gnomon data prepare`."
            )
        return np.frombuffer(raw, dtype=np.uint16), np.frombuffer(marks, dtype=np.uint8)

    def record(self, index: int) -> Encoded:
        ids, loss = self.arrays(index)
        return Encoded(ids.tolist(), loss.tolist())

    def row(self, members: Sequence[int]) -> PackedRow:
        """Records behind one another."""
        ids, loss = zip(*(self.arrays(i) for i in members), strict=True)
        return PackedRow(np.concatenate(ids).astype(np.int32), np.concatenate(loss), tuple(len(x) for x in ids))

    def fingerprint(self) -> str:
        """Hash of the record offsets and of a spread sample of the ids."""
        digest = hashlib.blake2b(self.offsets.tobytes(), digest_size=16)
        for index in range(0, len(self), max(1, len(self) // 2_048)):
            digest.update(self.arrays(index)[0].tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def plan(self, length: int) -> list[list[int]]:
        """Rows of record numbers, each at most `length` ids together, in the order of the file.

        Best fit over a few open rows, so that a curriculum written into the file survives. A record longer than a
        row is an error that names it.
        """
        sizes = np.diff(self.offsets)
        if sizes.max() > length:
            worst = int(sizes.argmax())
            raise DataError(f"record {worst} has {sizes[worst]} ids but a row holds {length}; raise --row-length.")
        done: list[list[int]] = []
        rows: list[tuple[int, list[int]]] = []  # (room left, records), oldest first
        for index, size in enumerate(sizes.tolist()):
            fitting = [i for i, (room, _) in enumerate(rows) if room >= size]
            if fitting:
                best = min(fitting, key=lambda i: rows[i][0])
                room, members = rows[best]
                members.append(index)
                rows[best] = (room - size, members)
                continue
            if len(rows) == OPEN_ROWS:
                done.append(rows.pop(min(range(OPEN_ROWS), key=lambda i: rows[i][0]))[1])
            rows.append((length - size, [index]))
        return done + [members for _, members in rows]

    def batch(self, rows: Sequence[Sequence[int]], length: int) -> Batch:
        """Collate planned rows."""
        return collate([self.row(members) for members in rows], length)


class BinSource:
    """Steps over packed bins: `rows` rows a step, the rows of a step a pure function of its number and `seed`.

    The first pass is in the order of the file, later ones are shuffled by steps. Raises DataError when the records do
    not fill one step.
    """

    def __init__(self, bins: Bins, rows: int, length: int, seed: str, vocab: int) -> None:
        self.bins, self.rows, self.length, self.seed, self.vocab = bins, rows, length, seed, vocab
        self._plan = bins.plan(length)
        self._order: tuple[int, list[int]] = (-1, [])
        if len(self._plan) < rows:
            raise DataError(
                f"{len(bins)} records fill {len(self._plan)} rows of {length} tokens, but one step takes {rows}; "
                "prepare more records or lower rows."
            )

    @property
    def fingerprint(self) -> str:
        return self.bins.fingerprint()

    @property
    def per_epoch(self) -> int:
        """Steps of one pass over the data."""
        return len(self._plan) // self.rows

    def step(self, number: int) -> StepData:
        epoch, at = divmod(number, self.per_epoch)
        if self._order[0] != epoch:
            order = list(range(self.per_epoch))
            if epoch:
                seeds.rng(self.seed, "epoch", epoch).shuffle(order)
            self._order = (epoch, order)
        first = self._order[1][at] * self.rows
        rows = tuple(self.bins.row(members) for members in self._plan[first : first + self.rows])
        worst = max(int(row.ids.max()) for row in rows)
        if worst >= self.vocab:
            raise DataError(
                f"{self.bins.folder}/{self.bins.split}.bin holds id {worst} in step {number}, but the vocabulary ends "
                f"at {self.vocab - 1}: the file was changed; write it again with `gnomon data prepare`."
            )
        return StepData(rows, self.length)

    def seek(self, number: int, cursor: Mapping[str, Any]) -> None:
        """Nothing to do: a step needs no history."""

    def close(self) -> None:
        self.bins.close()


def collate(rows: Sequence[PackedRow], length: int) -> Batch:
    """Rows as tensors of width `length`; records see only themselves, positions restart with each."""
    shape = (len(rows), length)
    ids = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, -100, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        n = len(row.ids)
        ids[r, :n] = row.ids
        targets[r, : n - 1] = np.where(row.loss[1:].astype(bool), row.ids[1:], -100)
        at = 0
        for number, size in enumerate(row.sizes, start=1):
            positions[r, at : at + size] = np.arange(size)
            segments[r, at : at + size] = number
            targets[r, at + size - 1] = -100  # the next id belongs to another record
            at += size
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        tokens=int((segments > 0).sum()),
    )
