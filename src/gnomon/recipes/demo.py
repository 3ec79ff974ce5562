"""`gnomon demo`: the main job in one go. A small model learns which strategy, how many tokens, how sure (row U8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gnomon.base.runs import Run, create_run
from gnomon.recipes import claims
from gnomon.recipes.metacog import MetacogRunConfig, Outcome, run_metacog


@dataclass(frozen=True)
class Demo:
    """What the demo leaves: the run folder, its report page, the claims table and the measured outcome."""

    folder: Path
    page: Path
    rows: list[claims.Row]
    outcome: Outcome


def demo_config(quick: bool = False, base: str = "nano") -> MetacogRunConfig:
    """The sizes of the demo; quick: a tenth of it, for tests and impatient people."""
    sizes = (65, 52, 26, 65) if quick else (600, 400, 200, 600)
    names = ("label_n", "calibration_n", "val_n", "test_n")
    return MetacogRunConfig(base=base, stream="demo", **dict(zip(names, sizes, strict=True)))


def run(config: MetacogRunConfig, root: Path, say: Callable[[str], object]) -> Demo:
    """Rollouts, heads, calibration, sweep, report. The trained layer lies in <run>/model."""
    run_folder: Run = create_run("demo", config, root=root, seed=config.seed)
    with run_folder:
        say(f"run folder: {run_folder.folder}")
        outcome = run_metacog(config, run_folder)
        page = claims.write(outcome, config, run_folder.folder, "gnomon demo: knowing how much to think")
        run_folder.write_json("claims.json", {"columns": claims.COLUMNS, "rows": claims.claims(outcome)})
    return Demo(run_folder.folder, page, claims.claims(outcome), outcome)
