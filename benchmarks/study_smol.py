"""Study f: confidence of a layer on frozen SmolLM2 against answer probability and trace length, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from study_base import Setup, look_up, plain, say, shown, table

from gnomon.base.errors import ConfigError
from gnomon.evaluation import metrics
from gnomon.evaluation.baselines import trace_length_score
from gnomon.recipes.metacog import draw_labels
from gnomon.training.heads_fit import read_greedy
from gnomon.training.labels import LabelSet

RIVALS = ("answer probability", "trace length", "(family, level) table")


def calibration_of(folder: Path) -> LabelSet:
    """The calibration labels among those of the run that made the layer: what the table is fitted on."""
    for facts in sorted(folder.glob("*/labels.json")):
        found = LabelSet.load(facts.parent)
        if found.meta.get("split") == "calibration":
            return found
    raise ConfigError(f"no calibration labels in {folder}; give --labels the labels folder of the run of --layer")


def gaps(mine: Any, rival: Any, right: Any) -> dict[str, Any]:
    """AUROC of both and the paired bootstrap of their difference."""
    ours, other = metrics.auroc(mine, right), metrics.auroc(rival, right)
    ci = metrics.bootstrap(lambda a, b, y: metrics.auroc(a, y) - metrics.auroc(b, y), mine, rival, right, draws=2000)
    return {"auroc": ours, "rival": other, "difference": ours - other, "ci": list(ci)}


def confidence(setup: Setup, layer: Path, *, stream: str, n: int, cap: int = 64) -> dict[str, Any]:
    """Both strategies uncapped (but for `cap`) on `n` fresh problems; per plan and family all differences."""
    reasoner = setup.base.with_layer(layer)
    if reasoner.decider is None:
        raise ConfigError(f"no layer in {layer}; train one: gnomon train metacog --base smollm2 --tasks gym:...")
    config = setup.config.model_copy(update={"stream": stream, "max_think": cap})
    labels = draw_labels(setup.base, config, "test", n, 0, setup.cache / "labels")
    held = calibration_of(setup.labels)
    r, fit_on = read_greedy(reasoner.decider.heads, labels), read_greedy(reasoner.decider.heads, held)
    body: dict[str, Any] = {"stream": stream, "n": n, "layer": str(layer), "plans": {}}
    for k, plan in enumerate(r["plans"]):
        right, used = r["correct"][:, k], r["used"][:, k]
        told = look_up(fit_on["family"], fit_on["level"], fit_on["correct"][:, k])
        rivals = {
            "answer probability": np.nan_to_num(r["answer_logprob"][:, k], nan=-1e9),
            "trace length": trace_length_score(used),
            "(family, level) table": told.predict(list(zip(r["family"], r["level"], strict=True))),
        }
        names = np.asarray(r["family"])
        parts = {"all": np.ones(n, dtype=bool)} | {str(f): names == f for f in np.unique(names)}
        body["plans"][plan] = {
            name: {"n": int(rows.sum()), "accuracy": float(right[rows].mean())}
            | {rival: gaps(r["conf_after"][rows, k], x[rows], right[rows]) for rival, x in rivals.items()}
            for name, rows in parts.items()
        }
        say(plan, "done")
        _show(body, plan)
    return plain(body)


def _show(body: dict[str, Any], plan: str) -> None:
    table(
        f"SmolLM2, plan {plan}, stream {body['stream']}, n = {body['n']}: AUROC, difference to rivals [paired 95 %]",
        ("family", "n", "accuracy", "confidence", *RIVALS),
        [
            (
                name, x["n"], x["accuracy"], x[RIVALS[0]]["auroc"],
                *(f"{shown(x[k]['rival'])}; {shown(x[k]['difference'])} {shown(x[k]['ci'])}" for k in RIVALS),
            )
            for name, x in body["plans"][plan].items()
        ],
    )  # fmt: skip
