"""Packed bins: every record once, records see only themselves, positions restart, damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gnomon.base import seeds
from gnomon.base.errors import DataError
from gnomon.data.corpus import OPEN_ROWS, Bins, write_bin
from gnomon.data.encode import Encoded
from gnomon.model.decoder import Decoder, DecoderConfig

LENGTH = 64


def records(count: int = 300) -> list[Encoded]:
    rng = seeds.rng("records")
    made = []
    for _ in range(count):
        size = rng.randint(5, 50)
        made.append(Encoded([rng.randrange(4, 100) for _ in range(size)], [rng.randint(0, 1) for _ in range(size)]))
    return made


@pytest.fixture
def bins(tmp_path: Path) -> Bins:
    assert write_bin(tmp_path, "train", records(), {"note": "test"}) == 300
    return Bins(tmp_path)


def test_what_is_written_is_read(bins: Bins) -> None:
    wanted = records()
    assert len(bins) == 300
    assert [bins.record(i) for i in range(300)] == wanted
    meta = json.loads((bins.folder / "train.json").read_text())
    assert meta == {"note": "test", "records": 300, "tokens": sum(len(r.ids) for r in wanted)}


def test_every_record_is_in_one_row(bins: Bins) -> None:
    plan = bins.plan(LENGTH)
    assert sorted(i for row in plan for i in row) == list(range(300))
    sizes = [len(r.ids) for r in records()]
    assert all(0 < sum(sizes[i] for i in row) <= LENGTH for row in plan)
    fill = sum(sizes) / (len(plan) * LENGTH)
    assert fill > 0.9
    assert plan == bins.plan(LENGTH)


def test_the_order_of_the_file_survives_roughly(bins: Bins) -> None:
    """A curriculum written into the file: a record is never far from its place."""
    order = [min(row) for row in bins.plan(LENGTH)]
    drift = max(abs(a - b) for a, b in zip(order, sorted(order), strict=True))
    assert drift < 12 * OPEN_ROWS


def test_a_batch_shows_every_record_and_its_targets(bins: Bins) -> None:
    plan = bins.plan(LENGTH)
    batch = bins.batch(plan, LENGTH)
    assert batch.ids.shape == (len(plan), LENGTH) and batch.mask.shape == (len(plan), 1, LENGTH, LENGTH)
    assert batch.tokens == sum(len(r.ids) for r in records())
    for r, members in enumerate(plan):
        at = 0
        for index in members:
            record = bins.record(index)
            n = len(record.ids)
            assert batch.ids[r, at : at + n].tolist() == record.ids
            assert batch.positions[r, at : at + n].tolist() == list(range(n))
            wanted = [i if on else -100 for i, on in zip(record.ids[1:], record.loss[1:], strict=True)]
            assert batch.targets[r, at : at + n].tolist() == [*wanted, -100]  # never the next record's first id
            view = batch.mask[r, 0, at : at + n]
            assert torch.equal(view[:, at : at + n], torch.ones(n, n, dtype=torch.bool).tril())
            assert view.sum() == n * (n + 1) // 2
            at += n
        assert (batch.targets[r, at:] == -100).all()
    assert batch.mask.any(-1).all()  # no empty softmax row, padding included


def test_perturbing_one_record_leaves_the_others(bins: Bins) -> None:
    seeds.seed_torch("corpus")
    model = Decoder(DecoderConfig(vocab_size=128, channels=32, layers=2, heads=2, context=LENGTH))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    row = next(members for members in bins.plan(LENGTH) if len(members) >= 3)
    batch = bins.batch([row], LENGTH)
    sizes = [len(bins.record(i).ids) for i in row]
    first, second = sizes[0], sizes[0] + sizes[1]
    changed = batch.ids.clone()
    changed[0, first:second] = (changed[0, first:second] + 1) % 128
    with torch.no_grad():
        a = model(batch.ids, batch.positions, batch.mask).logits[0]
        b = model(changed, batch.positions, batch.mask).logits[0]
        alone = model(batch.ids[:, second : second + sizes[2]]).logits[0]
    assert torch.equal(a[:first], b[:first]) and torch.equal(a[second:], b[second:])
    assert (a[first:second] - b[first:second]).abs().max() > 0.1
    assert (a[second : second + sizes[2]] - alone).abs().max() < 1e-5


def test_too_long_a_record_is_named(tmp_path: Path) -> None:
    long = Encoded([5] * 70, [1] * 70)
    write_bin(tmp_path, "train", [*records(9), long], {})
    with pytest.raises(DataError, match="record 9 has 70 ids but a row holds 64"):
        Bins(tmp_path).plan(LENGTH)


@pytest.mark.parametrize("bad", [Encoded([1, 2], [1]), Encoded([1, 70_000], [1, 1])])
def test_a_record_that_cannot_be_stored_is_named(tmp_path: Path, bad: Encoded) -> None:
    with pytest.raises(DataError, match="record 4: "):
        write_bin(tmp_path, "train", [*records(4), bad], {})


@pytest.mark.parametrize("kind", ["bin", "loss", "idx"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "odd"])
def test_damaged_bins_are_refused(bins: Bins, kind: str, damage: str) -> None:
    path = bins.folder / f"train.{kind}"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
        with pytest.raises(DataError, match=rf"no packed data: .*train.{kind} missing"):
            Bins(bins.folder)
        return
    path.write_bytes({"empty": b"", "short": data[:-8], "odd": data[:-1]}[damage])
    with pytest.raises(DataError, match="incomplete: write it again"):
        Bins(bins.folder)


def test_a_missing_split_is_named(bins: Bins) -> None:
    with pytest.raises(DataError, match="val.bin"):
        Bins(bins.folder, "val")
