"""Checkpoints: atomic, checked, never unpickled, never silently damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.base import checkpoint as ck
from gnomon.base import folders, seeds
from gnomon.base.errors import CheckpointError


def save(root: Path, step: int) -> Path:
    with ck.publish(root, step) as folder:
        ck.save_tensors(folder, "model.safetensors", {"w": torch.full((4, 3), float(step))})
        ck.save_tensors(folder, "train/optimiser.safetensors", {"m": torch.ones(2, dtype=torch.bfloat16)})
        (folder / "config.json").write_text("{}")
    return root / f"checkpoint-{step}"


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    shared = torch.randn(3, 4, generator=seeds.torch_generator("test"))
    tensors = {"a": shared, "tied": shared, "t": shared.t(), "i": torch.arange(5), "b": shared.bfloat16()}
    ck.save_tensors(tmp_path, "x.safetensors", tensors)
    back = ck.load_tensors(tmp_path, "x.safetensors")
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in tensors.items()}
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert ck.tensor_names(tmp_path, "x.safetensors")["t"] == (4, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_and_the_old_file_survives(tmp_path: Path, bad: float) -> None:
    ck.save_tensors(tmp_path, "x.safetensors", {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"w2"):
        ck.save_tensors(tmp_path, "x.safetensors", {"w": torch.ones(2), "w2": torch.tensor([1.0, bad])})
    assert list(ck.load_tensors(tmp_path, "x.safetensors")) == ["w"]


def test_publish_writes_manifest_latest_and_no_leftovers(tmp_path: Path) -> None:
    path = save(tmp_path, 500)
    names = [row["name"] for row in json.loads((path / "MANIFEST.json").read_text())["files"]]
    assert names == ["config.json", "model.safetensors", "train/optimiser.safetensors"]
    assert (tmp_path / "latest").read_text() == "checkpoint-500\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-500", "latest"]
    ck.verify_folder(path)


def test_failure_while_writing_publishes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt), ck.publish(tmp_path, 2) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "latest"]
    assert ck.newest(tmp_path).step == 1


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and put its checksum right again, as somebody would who wants us to read elsewhere."""
    body = json.loads((folder / "MANIFEST.json").read_text())
    change(body)
    (folder / "MANIFEST.json").write_text(json.dumps({**body, "sum": folders._sum(body)}) + "\n")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "MANIFEST.json").unlink(), "not finished"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "damaged"),
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (lambda f: os.truncate(f / "model.safetensors", 50), "50 of"),
        (lambda f: flip(f / "model.safetensors"), "checksum"),
        (lambda f: forge(f, lambda body: body["files"][0].update(name="../x")), "leaves"),
        (lambda f: forge(f, lambda body: body.update(version=7)), "version 7"),
    ],
)
def test_damaged_newest_is_skipped_and_named(tmp_path: Path, damage: object, told: str) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    damage(tmp_path / "checkpoint-10")  # type: ignore[operator]
    found = ck.newest(tmp_path)
    assert found.step == 9
    assert found.skipped[0][0] == "checkpoint-10"
    assert told in found.skipped[0][1]


def test_no_usable_checkpoint_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint-<step> folder"):
        ck.newest(tmp_path)
    (save(tmp_path, 1) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="lacks config"):
        ck.newest(tmp_path)


def test_same_step_again_replaces_and_orphans_go(tmp_path: Path) -> None:
    save(tmp_path, 3)
    orphan = tmp_path / ".tmp-checkpoint-4-999999999-ab12"
    orphan.mkdir()
    mine = tmp_path / f".tmp-checkpoint-4-{os.getpid()}-ab12"
    mine.mkdir()
    with ck.publish(tmp_path, 3) as folder:
        ck.save_tensors(folder, "model.safetensors", {"w": torch.zeros(1)})
    assert ck.load_tensors(tmp_path / "checkpoint-3", "model.safetensors")["w"].item() == 0
    assert not orphan.exists()
    assert mine.exists()


def test_prune_keeps_good_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-10" / "MANIFEST.json").unlink()
    assert ck.prune(tmp_path, 2) == ["checkpoint-1"]
    assert ck.newest(tmp_path).step == 3
    with pytest.raises(CheckpointError, match="at least 2"):
        ck.prune(tmp_path, 1)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", ""])
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="leaves its folder"):
        ck.load_tensors(tmp_path, name)


def test_pickles_damage_and_absence_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="never read"):
        ck.load_tensors(tmp_path, "pytorch_model.bin")
    (tmp_path / "x.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="damaged"):
        ck.load_tensors(tmp_path, "x.safetensors")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        ck.load_tensors(tmp_path, "model.safetensors")
