"""The report: self-contained, escaped, complete, and a clear error without matplotlib."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gnomon.base.errors import ConfigError
from gnomon.evaluation.plots import quality_vs_budget
from gnomon.evaluation.records import EvalRecord, summarise
from gnomon.evaluation.report import ReportData, Table, interval, show, write_report
from gnomon.evaluation.sweep import Outcome, run_sweep


class Tags(HTMLParser):
    """Checks that tags are balanced and collects attributes that could reach out."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        self.images += tag == "img"
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report_of(records: list[EvalRecord]) -> ReportData:
    def cut(strategy: str, rows: Any, budget: int) -> list[Outcome]:
        return [Outcome(correct=(i * 7 + budget) % 10 < 3, used=budget, closed=False) for i in rows]

    def full(strategy: str) -> list[Outcome]:
        scale = {"direct": 0, "steps": 1, "verify": 2, "decompose": 3}[strategy]
        return [Outcome(correct=(i * 7) % 10 < 3 + 2 * scale, used=scale * (5 + i % 40)) for i in range(200)]

    sweep = run_sweep(("direct", "steps", "verify", "decompose"), full, cut)
    sweep.extra["predicted"] = {"tokens": 24.0, "accuracy": 0.86, "accuracy_ci": [0.83, 0.89]}
    sweep.extra["best_fixed"] = {"tokens": 40.0, "accuracy": 0.8, "accuracy_ci": [0.77, 0.83]}
    sweep.extra["fixed:steps"] = {"tokens": 24.5, "accuracy": 0.5, "accuracy_ci": [0.43, 0.57]}
    sweep.extra["constants"] = {"points": [{"tokens": t, "accuracy": 0.3 + t / 90} for t in (50.0, 0.0, 20.0)]}
    return ReportData(
        title="nano <demo> & friends",
        summary=summarise(records, records, draws=20),
        records=records,
        sweep=sweep,
        alpha={"prompt": [0.1, 0.2, 0.3, 0.4], "think": [0.25] * 4, "end": [0.05, 0.05, 0.2, 0.7]},
        curves=[{"step": s, "train/loss": 3.0 / (1 + s), "val/loss": 3.1 / (1 + s)} for s in range(0, 200, 10)],
        tables=[
            Table("Claims", ("claim", "value", "met"), [("AUROC >= .85", 0.91, True), ("ECE <= .05", None, False)])
        ],
        facts={"command": "gnomon demo --seed 1 <x>"},
    )


def test_page_is_self_contained_and_escaped(tmp_path: Path, records_of: Callable[..., list[EvalRecord]]) -> None:
    pytest.importorskip("matplotlib")
    page = write_report(tmp_path, report_of(records_of(600, "report")))
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.images == 5
    assert all(s.startswith("data:image/png;base64,") for s in tags.sources)
    assert not re.search(r"https?://|<script|url\(", text)
    assert "nano &lt;demo&gt; &amp; friends" in text
    assert "--seed 1 &lt;x&gt;" in text
    assert '<span class="ok">met</span>' in text
    assert '<span class="bad">not met</span>' in text
    for words in ("By task", "By level", "Confidence against baselines", "answer probability", "Budget against"):
        assert words in text
    names = sorted(p.name for p in (tmp_path / "plots").glob("*.png"))
    assert names == [
        "alpha_by_layer.png",
        "predicted_vs_needed.png",
        "quality_vs_budget.png",
        "reliability.png",
        "training_curves.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "plots").glob("*.png"))


def test_policies_are_drawn_once_each(records_of: Callable[..., list[EvalRecord]]) -> None:
    pytest.importorskip("matplotlib")
    sweep = report_of(records_of(60, "policies")).sweep
    assert sweep is not None
    labels = [t.get_text() for t in quality_vs_budget(sweep).axes[0].get_legend().get_texts()]
    strategies = ["decompose", "direct", "steps", "verify"]
    assert sorted(labels) == sorted(["best fixed", "constants", "frontier", "no thinking", "predicted", *strategies])


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = write_report(tmp_path, ReportData(title="empty")).read_text(encoding="utf-8")
    assert "<img" not in text
    assert "empty" in text


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"gnomon\[plots\]"):
        write_report(tmp_path, ReportData(title="x"))


def test_numbers_as_text() -> None:
    assert [show(v) for v in (None, 3, 0.12345, 12.34, 1234.5, float("nan"))] == [
        "–",
        "3",
        "0.123",
        "12.3",
        "1234",
        "–",
    ]
    assert interval([0.1, 0.25]) == "[0.100, 0.250]"
    assert interval([None, None]) == "–"
