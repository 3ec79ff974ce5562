"""Packed token bins: records on disk as flat memory-mapped arrays, and rows of several records for training.

A bin is three files: `<split>.bin` (uint16 ids), `<split>.loss` (uint8, 1 = predicting this id is trained) and
`<split>.idx` (int64 record offsets, one more than records). Legend: R rows, T row length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gnomon.base.errors import DataError
from gnomon.data.encode import Encoded

OPEN_ROWS = 16


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
    """R packed rows: ids, targets (-100 = no loss), positions int64 [R, T]; mask bool [R, 1, T, T]."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    tokens: int


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
        self.ids = np.memmap(paths["bin"], dtype=np.uint16, mode="r")
        self.loss = np.memmap(paths["loss"], dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def record(self, index: int) -> Encoded:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Encoded(self.ids[start:end].tolist(), self.loss[start:end].tolist())

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

    def batch(self, rows: list[list[int]], length: int) -> Batch:
        """Collate planned rows; records see only themselves, positions restart with each."""
        shape = (len(rows), length)
        ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, -100, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)  # 0 = padding, which sees only padding
        for r, members in enumerate(rows):
            at = 0
            for number, index in enumerate(members, start=1):
                start, end = self.offsets[index], self.offsets[index + 1]
                n = int(end - start)
                ids[r, at : at + n] = self.ids[start:end]
                trained = self.loss[start + 1 : end].astype(bool)
                targets[r, at : at + n - 1] = np.where(trained, self.ids[start + 1 : end].astype(np.int64), -100)
                positions[r, at : at + n] = np.arange(n)
                segments[r, at : at + n] = number
                at += n
        seg = torch.from_numpy(segments)
        same = seg[:, :, None] == seg[:, None, :]
        mask = (same & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
        return Batch(
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(positions),
            mask=mask,
            tokens=int((segments > 0).sum()),
        )
