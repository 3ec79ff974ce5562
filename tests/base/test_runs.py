"""Run folders: what is in them, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gnomon.base.config import Config
from gnomon.base.errors import ConfigError
from gnomon.base.runs import Run, copy_provenance, create_run, find_run


class Small(Config):
    lr: float = 0.5
    name: str = "x"


def status(run: Run) -> dict[str, object]:
    return dict(json.loads((run.folder / "status.json").read_text()))


def test_folder_has_what_conventions_name(tmp_path: Path) -> None:
    with create_run("demo", Small(lr=0.25), tmp_path, {"lr": "override"}, seed=3, data={"a.jsonl": "ff"}) as run:
        run.row(1, **{"train/loss": float("nan")})
        run.events.emit("train/start", seed=3)
        run.status("running", stage="labels", step=1)
        assert status(run)["stage"] == "labels"
    assert yaml.safe_load((run.folder / "resolved.yaml").read_text()) == {"lr": 0.25, "name": "x"}
    facts = json.loads((run.folder / "provenance.json").read_text())
    assert (facts["origins"], facts["seed"], facts["data"]) == ({"lr": "override"}, 3, {"a.jsonl": "ff"})
    assert facts["versions"]["torch"]
    row = json.loads((run.folder / "metrics.jsonl").read_text())
    assert (row["step"], row["train/loss"], row["nonfinite"]) == (1, None, ["train/loss"])
    assert {p.name for p in run.folder.iterdir()} >= {"samples", "plots", "checkpoints", "events.jsonl"}
    assert status(run)["state"] == "done"
    copy_provenance(run.folder, run.checkpoints)
    assert (run.checkpoints / "resolved.yaml").is_file()


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt, "stopped"), (SystemExit, "stopped"), (ValueError, "failed")]
)
def test_every_end_leaves_a_state(tmp_path: Path, error: type[BaseException], state: str) -> None:
    with pytest.raises(error), create_run("demo", Small(), tmp_path) as run:
        raise error("why")
    assert status(run)["state"] == state
    assert ("why" in str(status(run).get("error"))) == (state == "failed")


def test_two_runs_in_one_second_do_not_collide_and_are_found(tmp_path: Path) -> None:
    runs = [create_run("demo", Small(), tmp_path) for _ in range(3)]
    assert len({r.folder for r in runs}) == 3
    assert find_run("latest", tmp_path) in [r.folder for r in runs]
    assert find_run(runs[0].name, tmp_path).name.startswith("demo-")
    assert find_run(str(runs[1].folder), tmp_path) == runs[1].folder
    with pytest.raises(ConfigError, match="did you mean"):
        find_run("dmo-2026", tmp_path)
    for run in runs:
        run.close()


@pytest.mark.parametrize("name", ["../x", "a b", "", ".hidden"])
def test_bad_run_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        create_run(name, Small(), tmp_path)
