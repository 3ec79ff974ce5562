"""Every kind of damage at every file of a checkpoint: noticed, named, and the one before it is taken."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gnomon.base import checkpoint as ck
from gnomon.base.atomic import write_atomic
from gnomon.base.errors import CheckpointError

FILES = (
    "model.safetensors", "config.json", "tokenizer.model", "resolved.yaml", "train/0-adamw.safetensors",
    "train/state.json", "MANIFEST.json",
)  # fmt: skip


def save(root: Path, step: int) -> Path:
    with ck.publish(root, step) as folder:
        model = torch.nn.Linear(4, 3)
        ck.save_tensors(folder, "model.safetensors", {k: v + step for k, v in model.state_dict().items()})
        ck.save_tensors(folder / "train", "0-adamw.safetensors", {"weight|exp_avg": torch.ones(3, 4)})
        for name in ("config.json", "tokenizer.model", "resolved.yaml", "train/state.json"):
            write_atomic(folder / name, json.dumps({"step": step, "name": name}))
    return root / f"checkpoint-{step}"


def flip(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return damage


def cut(keep: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(keep * (path.stat().st_size - 1)))


def linked(path: Path) -> None:
    copy = path.parents[3] / "copy"
    shutil.move(path, copy)
    path.symlink_to(copy)


def foreign(path: Path) -> None:
    (path.parent / f"{path.name}.bak").write_text("x")


def hidden(path: Path) -> None:
    (path.parent / ".tmpA1b2C3").write_text("x")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "first bit": flip(0.0), "middle bit": flip(0.5), "last bit": flip(1.0), "last byte cut": cut(1.0),
    "half cut": cut(0.5), "empty": cut(0.0), "missing": Path.unlink, "link": linked, "foreign": foreign,
    "safetensors orphan": hidden, "folder": folder,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_at_each_file_is_named_and_the_one_before_is_taken(quick: Path, name: str, damage: str) -> None:
    root = quick / "run" / "checkpoints"
    save(root, 1)
    DAMAGES[damage](save(root, 2) / name)
    found = ck.newest(root)
    assert found.step == 1
    assert [n for n, _ in found.skipped] == ["checkpoint-2"]
    what = {"foreign": ".bak", "safetensors orphan": ".tmpA1b2C3"}.get(damage, name)
    assert what in found.skipped[0][1] or (name == "MANIFEST.json" and "it was not finished" in found.skipped[0][1])


def test_a_flip_anywhere_in_a_manifest_counts(quick: Path) -> None:
    path = save(quick, 5) / "MANIFEST.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(CheckpointError):
            ck.verify_folder(path.parent, checksums=False)
    path.write_bytes(data)
    ck.verify_folder(path.parent)


@pytest.mark.slow
def test_every_single_bit_of_a_checkpoint_counts(quick: Path) -> None:
    root = save(quick, 5)
    for name in FILES:
        data = (root / name).read_bytes()
        for at, bit in itertools.product(range(len(data)), range(8)):
            (root / name).write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            with pytest.raises(CheckpointError):
                ck.verify_folder(root)
        (root / name).write_bytes(data)
    ck.verify_folder(root)


def test_names_that_are_no_checkpoints_of_this_run(quick: Path) -> None:
    good = save(quick, 1)
    shutil.copytree(good, quick / "checkpoint-7")  # renamed by hand
    shutil.move(save(quick, 8), quick / "elsewhere")
    (quick / "checkpoint-8").symlink_to(quick / "elsewhere")
    (quick / "checkpoint-9").write_text("a file")
    (quick / "checkpoint-010").mkdir()
    (quick / "checkpoint-11").mkdir()
    (quick / "checkpoint-12").symlink_to("nowhere")
    found = ck.newest(quick)
    why = dict(found.skipped)
    assert found.step == 1
    assert "symbolic link" in why["checkpoint-8"] and "symbolic link" in why["checkpoint-12"]
    assert "no folder" in why["checkpoint-9"] and "not finished" in why["checkpoint-11"]
    assert "saved as step 1: somebody renamed it" in why["checkpoint-7"]
    assert ck.steps(quick) == [1, 7, 8, 11]


def test_a_save_onto_a_foreign_name_keeps_what_was_there(quick: Path) -> None:
    (quick / "precious").mkdir()
    (quick / "precious" / "x").write_text("mine")
    (quick / "checkpoint-1").symlink_to("precious")
    (quick / "checkpoint-2").write_text("a file")
    for step in (1, 2):
        save(quick, step)
        ck.verify_folder(quick / f"checkpoint-{step}")
    kept = {p.name[:20]: p for p in quick.glob("foreign-*")}
    assert kept["foreign-checkpoint-1"].is_symlink() and kept["foreign-checkpoint-2"].read_text() == "a file"
    assert (quick / "precious" / "x").read_text() == "mine"


def test_what_file_managers_leave_is_no_damage(quick: Path) -> None:
    (save(quick, 1) / ".DS_Store").write_text("x")
    (quick / "checkpoint-1" / "train" / "Thumbs.db").write_text("x")
    assert ck.newest(quick).skipped == ()


@pytest.mark.parametrize(
    ("text", "told"), [("checkpoint-99\n", "not there"), ("../../etc\n", "not there"), ("\xff" * 300, "names")]
)
def test_latest_is_a_hint_and_a_lost_one_is_named(quick: Path, text: str, told: str) -> None:
    save(quick, 1)
    (quick / "latest").write_text(text, encoding="utf-8")
    found = ck.newest(quick)
    assert found.step == 1
    assert found.skipped[0][0] == "latest" and told in found.skipped[0][1]
    (quick / "latest").unlink()
    assert ck.newest(quick).skipped == ()
    (quick / "latest").symlink_to("checkpoint-1")
    assert "symbolic link" in ck.newest(quick).skipped[0][1]
    save(quick, 2)
    assert (quick / "latest").read_text() == "checkpoint-2\n" and not (quick / "latest").is_symlink()


def test_a_huge_header_is_refused(quick: Path) -> None:
    (quick / "x.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with (quick / "y.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200 * 2**20))
        file.truncate(201 * 2**20)
    for name in ("x.safetensors", "y.safetensors"):
        for read in (ck.load_tensors, ck.tensor_names):
            with pytest.raises(CheckpointError, match="damaged"):
                read(quick, name)


def test_tensors_of_another_model_are_named_and_the_one_before_is_taken(quick: Path) -> None:
    wanted = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    others = {
        2: ({"weight": torch.zeros(4, 3), "bias": torch.zeros(3)}, r"weight is \(4, 3\) float32.* \(3, 4\) float32"),
        3: ({"weight": torch.zeros(3, 4).half(), "bias": torch.zeros(3)}, r"float16, this model .*float32"),
        4: ({"weight": torch.zeros(3, 4)}, "bias is missing"),
        5: ({**wanted, "more": torch.zeros(1)}, "more is not of this model"),
    }
    save(quick, 1)
    for step, (tensors, told) in others.items():
        with ck.publish(quick, step) as folder:
            ck.save_tensors(folder, "model.safetensors", tensors)
        with pytest.raises(CheckpointError, match=told):
            ck.check_tensors(quick / f"checkpoint-{step}", "model.safetensors", wanted)
    found = ck.newest(quick, check=lambda path: ck.check_tensors(path, "model.safetensors", wanted))
    assert found.step == 1
    assert [name for name, _ in found.skipped] == [f"checkpoint-{n}" for n in (5, 4, 3, 2)]


def test_manifests_of_version_1_are_still_read(quick: Path) -> None:
    path = save(quick, 3) / "MANIFEST.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({"version": 1, "step": 3, "files": body["files"]}, indent=1))
    assert ck.newest(quick).step == 3
    save(quick, 2)  # a way back: what is saved now is newer
    assert ck.newest(quick).step == 2
