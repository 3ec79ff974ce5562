"""What the metacognitive layer can and cannot do today, measured: heads only, no adapters, no gate.

    python benchmarks/studies.py heads|slackstop|running|ablations|domain|savings|smollm2 --labels FOLDER --cache FOLDER

Tables go to stdout, progress to stderr, numbers to CACHE/<study>.json. Labels are those of `train metacog --base nano`
with stream "ship" (drawn anew where FOLDER lacks them, which takes minutes); heads are fitted once per seed and kept in
the cache. Settings are chosen on val or calibration; every number is of test streams named in the table, which nothing
else uses. Stories of the numbers: docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from study_base import Setup, fitted, plain, say

from gnomon.reasoner import Reasoner
from gnomon.recipes.metacog import MetacogRunConfig, draw_labels
from gnomon.training.heads_fit import HeadsConfig

SHARED = "studies-heads-1"  # one uncapped pass of all strategies serves ablations, domain and savings
GYM = "gym:chain_sum,gym:products,gym:letter_counting"


def nano(args: argparse.Namespace) -> Setup:
    """nano with the labels that its shipped layer was made of."""
    config = MetacogRunConfig(
        base="nano", stream="ship", label_n=args.label_n, calibration_n=args.calibration_n, val_n=args.label_val_n,
        heads=HeadsConfig(steps=args.steps),
    )  # fmt: skip
    return Setup(Reasoner.load("nano"), config, args.labels, args.cache, args.seeds)


def gym(args: argparse.Namespace) -> Setup:
    """SmolLM2-135M, frozen, on three reasoning-gym families."""
    config = MetacogRunConfig(base="smollm2", tasks=GYM, stream="ship", max_batch=16)
    return Setup(Reasoner.load("smollm2"), config, args.labels, args.cache, args.seeds)


def heads(args: argparse.Namespace) -> dict[str, Any]:
    """Only fit the heads that the other studies share."""
    from study_heads import Train

    setup = nano(args)
    train = Train(setup)
    return {str(k): fitted(setup, "attention", {}, k, train).report for k in range(setup.seeds)}


def slackstop(args: argparse.Namespace) -> dict[str, Any]:
    from study_slack import slackstop as study

    if args.base == "smollm2":
        return study(
            gym(args), plans=("steps",), stream="studies-slack-smol-1", n=args.n or 150, val_n=args.val_n or 75
        )
    return study(
        nano(args), plans=("verify", "steps"), stream="studies-slack-2", n=args.n or 1300, val_n=args.val_n or 650
    )


def running(args: argparse.Namespace) -> dict[str, Any]:
    from study_running import running as study

    return study(nano(args), stream="slack-5", n=args.n or 2000, val_n=args.val_n or 2000, trial_n=args.trial_n)


def ablations(args: argparse.Namespace) -> dict[str, Any]:
    from study_heads import ablations as study

    return study(nano(args), stream=SHARED, n=args.n or 3900)


def domain(args: argparse.Namespace) -> dict[str, Any]:
    from study_domain import blocks
    from study_domain import domain as study

    if args.base == "smollm2":  # the labels of study smollm2
        setup = gym(args)
        config = setup.config.model_copy(update={"stream": "studies-smol-2", "max_think": 64})
        labels = draw_labels(setup.base, config, "test", args.n or 1200, 0, setup.cache / "labels")
        return {"blocks": blocks(labels, range(setup.base.backbone.n_layers))}
    return study(nano(args), stream=SHARED, n=args.n or 3900)


def savings(args: argparse.Namespace) -> dict[str, Any]:
    from study_savings import savings as study

    return study(nano(args), stream=SHARED, n=args.n or 3900)


def smollm2(args: argparse.Namespace) -> dict[str, Any]:
    from study_smol import confidence as study

    return study(gym(args), args.layer, stream="studies-smol-2", n=args.n or 1200)


STUDIES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    f.__name__: f for f in (heads, slackstop, running, ablations, domain, savings, smollm2)
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=sorted(STUDIES))
    parser.add_argument("--labels", type=Path, default=Path("runs/studies/labels"), help="folder of cached label sets")
    parser.add_argument("--cache", type=Path, default=Path("runs/studies"), help="fitted heads and results")
    parser.add_argument("--base", choices=("nano", "smollm2"), default="nano", help="slackstop and domain only")
    parser.add_argument("--layer", type=Path, default=Path("runs/smollm2/model"), help="smollm2 only: a trained layer")
    parser.add_argument("--n", type=int, help="test problems (default: the study's own)")
    parser.add_argument("--val-n", type=int, help="val problems that rules are chosen on")
    parser.add_argument("--trial-n", type=int, default=3000, help="running: train problems with trial answers")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=HeadsConfig().steps, help="of fitting heads")
    for name, default in (("label-n", 12000), ("calibration-n", 4500), ("label-val-n", 1300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(arguments)
    if args.study is None:  # `make bench` runs every script here
        parser.print_help()
        return
    torch.set_num_threads(1)
    body = plain(STUDIES[args.study](args))
    name = args.study if args.base == "nano" else f"{args.study}-{args.base}"
    args.cache.mkdir(parents=True, exist_ok=True)
    (args.cache / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {args.cache / f'{name}.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
