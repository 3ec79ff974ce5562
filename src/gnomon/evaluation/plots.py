"""The charts of a report as matplotlib figures. matplotlib is an optional extra (`plots`)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from gnomon.base.errors import ConfigError
from gnomon.evaluation import metrics
from gnomon.evaluation.records import EvalRecord
from gnomon.evaluation.sweep import Sweep
from gnomon.protocol.tags import STRATEGIES

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e6e8ee"
COLOURS: Final[tuple[str, ...]] = (
    "#3b6fd4",
    "#e07b39",
    "#2a9d78",
    "#9b5fc0",
    "#c2413f",
    "#8a7a2f",
    "#4aa3c7",
    "#555b6e",
)


def pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises ConfigError naming the extra when it is absent."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("charts need matplotlib; install it with: pip install 'gnomon[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10.5,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "text.color": INK,
            "legend.frameon": False,
            "figure.dpi": 100,
        }
    )
    return plt


def png(figure: Any) -> bytes:
    """A figure as PNG bytes; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)
    return buffer.getvalue()


def _colour(strategy: str) -> str:
    """The same colour for a strategy in every chart."""
    known = STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES)
    return COLOURS[known % len(COLOURS)]


def _token_axis(axis: Any, top: float) -> None:
    """Ticks 0, 4, 8, 16 … up to the top, as whole numbers."""
    ticks = [0] + [2**k for k in range(2, 20) if 2**k <= top * 1.3]
    axis.set_major_locator(pyplot().FixedLocator(ticks))
    axis.set_minor_locator(pyplot().NullLocator())
    axis.set_major_formatter(lambda v, _: f"{v:g}")


def quality_vs_budget(sweep: Sweep) -> Any:
    """Accuracy against mean think tokens: one line per strategy, the upper hull, the policies, the no-think floor."""
    figure, ax = pyplot().subplots(figsize=(8.2, 4.6))
    for strategy in sweep.strategies:
        points = [sweep.point(strategy, b) for b in sweep.budgets]
        x, y = [p.tokens for p in points], [p.accuracy for p in points]
        below = [p.accuracy - p.accuracy_ci[0] for p in points]
        above = [p.accuracy_ci[1] - p.accuracy for p in points]
        ax.errorbar(
            x,
            y,
            yerr=[below, above],
            color=_colour(strategy),
            lw=1.8,
            marker="o",
            ms=8 if max(x) == 0 else 4,
            elinewidth=0.8,
            alpha=0.9,
            label=strategy,
        )
    hull = sweep.frontier()
    fine = np.linspace(hull[0][0], hull[-1][0], 400)
    bend = np.interp(fine, [t for t, _ in hull], [a for _, a in hull])
    ax.plot(fine, bend, color=INK, lw=1.2, ls="--", label="frontier")
    ax.axhline(sweep.no_think(), color=MUTED, lw=1, ls=":", label="no thinking")
    curves = {name: policy["points"] for name, policy in sweep.extra.items() if "points" in policy}
    for name, points in curves.items():
        ordered = sorted((p["tokens"], p["accuracy"]) for p in points)
        ax.plot(*zip(*ordered, strict=True), color=COLOURS[5], lw=1.2, ls="-.", label=name.replace("_", " "))
    drawn = {k: v for k, v in sweep.extra.items() if "tokens" in v and not k.startswith("fixed:")}  # fixed: on a line
    for i, (name, policy) in enumerate(sorted(drawn.items(), key=lambda item: item[0] != "predicted")):
        low, high = policy.get("accuracy_ci") or (policy["accuracy"], policy["accuracy"])
        ax.errorbar(
            policy["tokens"],
            policy["accuracy"],
            yerr=[[max(0.0, policy["accuracy"] - low)], [max(0.0, high - policy["accuracy"])]],
            ls="",
            marker="*D^sP"[i % 5],
            ms=15 if i == 0 else 8,
            color=COLOURS[(4 + i) % len(COLOURS)],
            mec="white",
            elinewidth=0.9,
            label=name.replace("_", " "),
            zorder=5,
        )
    ax.set_xscale("symlog", linthresh=4)
    top = max((p.tokens for p in sweep.points), default=1.0)
    _token_axis(ax.xaxis, top)
    ax.set_xlim(-0.4, top * 1.3 + 1)
    ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]), top=min(1.02, ax.get_ylim()[1] + 0.03))
    ax.set_xlabel("mean think tokens")
    ax.set_ylabel("accuracy")
    ax.set_title("Quality against budget")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def predicted_vs_needed(records: Sequence[EvalRecord]) -> Any:
    """Predicted budget (before clipping) against need in the uncapped pass; correct solutions that think."""
    rows = [r for r in records if r.needed is not None and r.needed_correct and r.budget_predicted is not None]
    rows = [r for r in rows if r.plan != "direct"]
    figure, ax = pyplot().subplots(figsize=(5.8, 5.0))
    for plan in sorted({r.plan for r in rows}):
        part = [r for r in rows if r.plan == plan]
        x, y = [r.needed or 0 for r in part], [max(r.budget_predicted or 0.0, 0.0) for r in part]
        ax.scatter(x, y, s=11, alpha=0.45, color=_colour(plan), lw=0, label=plan)
    top = max([1.0] + [max(r.needed or 0, r.budget_predicted or 0.0) for r in rows]) * 1.25
    ax.plot([0, top], [0, top], color=INK, lw=1, ls="--")
    ax.set_xscale("symlog", linthresh=8)
    ax.set_yscale("symlog", linthresh=8)
    ax.set_xlim(0, top)
    ax.set_ylim(0, top)
    for axis in (ax.xaxis, ax.yaxis):
        _token_axis(axis, top / 1.3)
    ax.set_xlabel("needed think tokens (uncapped)")
    ax.set_ylabel("predicted think tokens")
    corr = metrics.budget_corr([r.budget_predicted or 0.0 for r in rows], [r.needed or 0 for r in rows])
    ax.set_title("Predicted against needed" + ("" if math.isnan(corr) else f"   r = {corr:.2f}"))
    if rows:
        ax.legend(loc="upper left", markerscale=2)
    return figure


def reliability(records: Sequence[EvalRecord]) -> Any:
    """Reliability diagrams of confidence before and after thinking; 10 bins of equal mass with Wilson bars."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9.2, 4.5), sharey=True)
    for ax, name, title in ((axes[0], "conf_before", "before thinking"), (axes[1], "conf_after", "after thinking")):
        rows = [r for r in records if getattr(r, name) is not None]
        prob, right = [getattr(r, name) for r in rows], [r.correct for r in rows]
        ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--")
        bins = metrics.reliability(prob, right) if rows else []
        if bins:
            x, y = [b[0] for b in bins], [b[1] for b in bins]
            bars = [metrics.wilson(round(c * n), n) for _, c, n in bins]
            error = [[max(0.0, c - lo) for c, (lo, _) in zip(y, bars, strict=True)],
                     [max(0.0, hi - c) for c, (_, hi) in zip(y, bars, strict=True)]]  # fmt: skip
            ax.errorbar(x, y, yerr=error, color=COLOURS[0], marker="o", ms=5, lw=1.6, elinewidth=0.9)
        area = metrics.auroc(prob, right) if rows else math.nan
        value = metrics.ece(prob, right) if rows else math.nan
        ax.set_title(f"Confidence {title}")
        ax.text(0.03, 0.93, f"ECE {value:.3f}   AUROC {area:.3f}   n {len(rows)}", transform=ax.transAxes, color=MUTED)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_xlabel("stated probability")
    axes[0].set_ylabel("share correct")
    return figure


def alpha_by_layer(alpha: Mapping[str, Sequence[float]]) -> Any:
    """Mean aggregator weight of every layer, one row per site (heat map with the numbers)."""
    names = list(alpha)
    table = np.array([list(alpha[n]) for n in names], dtype=np.float64)
    width = max(5.0, min(12.0, 0.55 * table.shape[1] + 2.0))
    figure, ax = pyplot().subplots(figsize=(width, 0.6 * len(names) + 1.5))
    image = ax.imshow(table, aspect="auto", cmap="Blues", vmin=0.0, vmax=max(float(table.max()), 2.0 / table.shape[1]))
    ax.set_yticks(range(len(names)), names)
    step = max(1, table.shape[1] // 16)
    ax.set_xticks(range(0, table.shape[1], step))
    ax.grid(visible=False)
    if table.shape[1] <= 16:
        for i, row in enumerate(table):
            for j, v in enumerate(row):
                shade = "white" if v > 0.6 * image.get_clim()[1] else INK
                ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=8, color=shade)
    ax.set_xlabel("layer")
    ax.set_title("Which layers are trusted (mean α)")
    figure.colorbar(image, ax=ax, fraction=0.03, pad=0.02)
    return figure


def gates_by_token(sample: Mapping[str, Any]) -> Any:
    """Gates of the side adapters over one thought: blocks down, tokens across (heat map).

    sample: `tokens` [T] texts, `blocks` [A] numbers, `gates` [A][T] in [0, 1].
    """
    table = np.array(sample["gates"], dtype=np.float64)
    tokens, blocks = list(sample["tokens"]), list(sample["blocks"])
    figure, ax = pyplot().subplots(figsize=(max(5.0, min(14.0, 0.3 * len(tokens) + 2.0)), 0.35 * len(blocks) + 1.8))
    image = ax.imshow(table, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0)
    ax.set_yticks(range(len(blocks)), blocks)
    step = max(1, len(tokens) // 48)
    shown = range(0, len(tokens), step)
    ax.set_xticks(shown, [tokens[i] for i in shown], rotation=90, fontsize=8)
    ax.grid(visible=False)
    ax.set_ylabel("block")
    ax.set_title("Where the side adapters are open, one thought")
    figure.colorbar(image, ax=ax, fraction=0.03, pad=0.02)
    return figure


# What a training run is watched by, in this order; other metrics follow by name.
_FIRST: Final[tuple[str, ...]] = (
    "train/loss", "eval/logic_accuracy", "train/tok_per_sec", "train/grad_norm", "train/lr", "train/skipped",
    "data/wait_share", "budget/used", "budget/predicted",
)  # fmt: skip
_LOGARITHMIC: Final = ("train/grad_norm",)
MOST_CURVES: Final = 12
Mark = tuple[float, int, str]  # step, index of COLOURS, word


def training_curves(rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark] = ()) -> Any:
    """One small chart per metric of a training log; rows hold `step` and slash names. At most 12 charts.

    Long noisy curves are drawn faint with a running median over them. marks: steps at which something happened.
    """
    known = {k for r in rows for k, v in r.items() if k not in ("step", "time") and isinstance(v, (int, float))}
    names = [*(n for n in _FIRST if n in known), *sorted(known - {*_FIRST, "tokens"})][:MOST_CURVES] or sorted(known)
    columns = min(3, max(1, len(names)))
    lines = max(1, math.ceil(len(names) / columns))
    figure, axes = pyplot().subplots(lines, columns, figsize=(4.0 * columns, 2.5 * lines), squeeze=False, sharex=True)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        points = [
            (r["step"], r[name]) for r in rows if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])
        ]
        _curve(ax, name, points)
        for step, colour, _ in marks:
            ax.axvline(step, color=COLOURS[colour], lw=0.8, ls=":", alpha=0.8, zorder=0)
        ax.set_title(name, fontsize=10)
        ax.tick_params(labelbottom=True)
    words = {word: colour for _, colour, word in marks}
    if words:
        line = pyplot().Line2D
        handles = [line([], [], color=COLOURS[c], lw=1.2, ls=":", label=w) for w, c in words.items()]
        figure.legend(handles=handles, loc="lower right", ncols=len(handles), fontsize=9)
    figure.supxlabel("step", color=MUTED, fontsize=10)
    figure.tight_layout()
    return figure


def _curve(ax: Any, name: str, points: Sequence[tuple[float, float]]) -> None:
    """One metric over steps: few points as dots and line, many as they are under their running median."""
    x, y = [p[0] for p in points], np.array([p[1] for p in points], dtype=np.float64)
    if name in _LOGARITHMIC and len(y) and (y > 0).all():
        ax.set_yscale("log")
    if name.endswith("accuracy"):
        ax.set_ylim(-0.03, 1.03)
    elif len(y) and y.min() == y.max() >= 0:  # constant: not a hundredth of a unit high
        top = max(1.0, 1.3 * float(y.max()))
        ax.set_ylim(-0.03 * top, top)
    if len(y) <= 40:
        ax.plot(x, y, color=COLOURS[0], lw=1.5, marker="o", ms=3)
        return
    half = max(2, len(y) // 60)
    middle = [float(np.median(y[max(0, i - half) : i + half + 1])) for i in range(len(y))]
    steady = name in ("train/lr", "train/skipped")
    ax.plot(x, y, color=COLOURS[0], lw=1.5 if steady else 0.8, alpha=1.0 if steady else 0.3)
    if not steady:
        ax.plot(x, middle, color=COLOURS[0], lw=1.6)
        low, high = np.percentile(y, (0.5, 99.5))
        room = 0.15 * (high - low) or 0.1 * abs(high) or 0.1
        if ax.get_yscale() == "linear" and name != "train/loss" and high > low:
            ax.set_ylim(low - room, high + room)  # a pause or a check must not flatten the rest
