"""`gnomon demo`: the main job in one go. A small model learns which strategy, how many tokens, how sure (row U8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gnomon.base.runs import Run, create_run
from gnomon.base.telemetry import Progress
from gnomon.recipes import claims
from gnomon.recipes.metacog import MetacogRunConfig, Outcome, run_metacog
from gnomon.recipes.pretrain import CorpusConfig
from gnomon.recipes.pretrain_config import PretrainRunConfig, ShapeConfig
from gnomon.recipes.pretrain_run import run as run_pretrain

EASY_TASKS = ("boolean", "kinship", "lookup", "sort")
EASY_LEVELS = (1, 2)


@dataclass(frozen=True)
class Demo:
    """What the demo leaves: the run folder, its report page, the claims table and the measured outcome."""

    folder: Path
    page: Path
    rows: list[claims.Row]
    outcome: Outcome


def demo_config(quick: bool = False, base: str = "nano") -> MetacogRunConfig:
    """The sizes of the demo; quick: a tenth of it, for tests and impatient people."""
    label_n, calibration_n, val_n, test_n = (65, 52, 26, 65) if quick else (2600, 1040, 390, 1040)
    return MetacogRunConfig(
        base=base, stream="demo", label_n=label_n, calibration_n=calibration_n, val_n=val_n, test_n=test_n
    )


def scratch_config(steps: int = 1600) -> PretrainRunConfig:
    """`micro` on a few easy families: about ten minutes on two cores."""
    corpus = CorpusConfig(
        records=steps * 32, stream="demo-scratch", tasks=EASY_TASKS, levels=EASY_LEVELS, demonstrations=0.0
    )
    return PretrainRunConfig(
        model=ShapeConfig(preset="micro"), steps=steps, seed="demo-scratch", corpus=corpus, save_every=500
    )


def from_scratch(root: Path, say: Callable[[str], object], config: PretrainRunConfig | None = None) -> MetacogRunConfig:
    """Train `micro` from nothing; returns the demo config for what it learned."""
    config = config or scratch_config()
    opened = create_run("scratch", config, root=root, seed=config.seed)
    opened.close()
    say(f"training {config.model.preset} from nothing on {', '.join(config.corpus.tasks)}: {opened.folder}")
    with Progress("pretrain", config.steps) as bar:

        def count(_step: int) -> bool:
            bar.advance()
            return False

        facts = run_pretrain(config, opened.folder, stop=count)
    if facts["stopped"]:
        raise KeyboardInterrupt(f"pretraining stopped at step {facts['step']}; it is saved in {facts['checkpoint']}")
    return demo_config(base=facts["checkpoint"]).model_copy(
        update={"tasks": ",".join(config.corpus.tasks), "levels": config.corpus.levels, "stream": "demo-scratch"}
    )


def run(
    config: MetacogRunConfig, root: Path, say: Callable[[str], object], on_open: Callable[[Path], object] | None = None
) -> Demo:
    """Rollouts, heads, calibration, sweep, report. The trained layer lies in <run>/model.

    on_open: called with the run folder before anything slow.
    """
    run_folder: Run = create_run("demo", config, root=root, seed=config.seed)
    if on_open is not None:
        on_open(run_folder.folder)
    with run_folder:
        say(f"run folder: {run_folder.folder}")
        outcome = run_metacog(config, run_folder)
        page = claims.write(outcome, config, run_folder.folder, "gnomon demo: knowing how much to think")
        rows = claims.claims(outcome)
        run_folder.write_json("claims.json", {"columns": claims.COLUMNS, "rows": rows})
    return Demo(run_folder.folder, page, rows, outcome)
