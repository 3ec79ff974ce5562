"""`data inspect` on text files: what people read and what programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.test_foreign import tiny
from tests.interfaces.test_cli import call

from gnomon.data.corpus import write_bin
from gnomon.data.encode import encode_record
from gnomon.data.tokenizer import Tokenizer
from gnomon.interfaces import cli
from gnomon.interfaces.inspecting import coloured, histogram, padding
from gnomon.protocol.graph import Node
from gnomon.protocol.tags import END_THINK, PLAN, THINK
from gnomon.reasoner import shipped


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"Compute {i} + 1.", "response": f"{THINK}{i} + 1 = {i + 1}{END_THINK}{i + 1}"} for i in range(30)
    ]
    rows[4]["prompt"] = f"What is {END_THINK}?"
    lines = [json.dumps(row) for row in rows]
    lines[9:9] = ["{}", '{"prompt": NaN}', '{"prompt": "a", "answer": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return tmp_path / "a.jsonl"


def test_people_see_roles_counts_reasons_lengths_and_padding(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    code, shown, _ = call(capsys, "data", "inspect", str(path), "--columns", "completion=response", "--n", "2")
    assert code == 0
    flat = " ".join(shown.split())
    assert "Compute 0 + 1." in flat and "Compute 1 + 1." in flat and "Compute 2" not in flat
    assert "30 rows used (of them 1 escaped), 3 quarantined" in flat and "NaN" in flat
    assert "row length probed: 64" in flat and "1 to 64" in flat and "padding: none" in flat


def test_programs_see_the_same(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    words = ["data", "inspect", str(path), "--columns", "completion=response", "--n", "1", "--start", "2", "--json"]
    code, shown, _ = call(capsys, *words)
    body = json.loads(shown)
    (source,) = body["sources"]
    assert code == 0 and (source["used"], source["escaped"], source["quarantined"]) == (30, 1, 3)
    assert sum(source["reasons"].values()) == 3 and source["records"] == sum(source["sizes"].values()) == 30
    assert [r["row"] for r in source["refused"]] == [10] and source["max_len"] == 64
    (spans,) = source["shown"]
    texts = {s["text"]: s["role"] for s in spans}
    assert texts[" Compute 2 + 1."] == texts[PLAN["steps"]] == "given" and texts[" 3"] == "trained"
    assert body["padding"]["side"] == "none" and body["padding"]["corrected"] is False
    assert json.loads(call(capsys, *words[:3], "--json", "--rows", "3")[1])["sources"][0]["quarantined"] == 3


def test_faults_and_empty_requests_are_user_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"hello")
    for words, reason in (
        ([str(tmp_path / "a.arrow")], "no Arrow file"),
        ([str(tmp_path / "b.jsonl")], "nothing at"),
        ([], "nothing to inspect"),
        ([str(tmp_path / "a.arrow"), "--columns", "answr=x"], "role in text.columns"),
    ):
        code, _, err = call(capsys, "data", "inspect", *words)
        assert code == cli.USER_ERROR and reason in err


def test_a_corpus_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tok = Tokenizer.load(shipped("nano"))
    write_bin(tmp_path, "train", [encode_record(tok, "3 + 4", "steps", (Node("S", "7"),), "7")], {})
    tok.save(tmp_path)
    body = json.loads(call(capsys, "data", "inspect", str(tmp_path), "--json")[1])
    assert body["records"] == 1 and "".join(s["text"] for s in body["shown"][0]).count(THINK) == 1


def test_colours_are_roles() -> None:
    tok = Tokenizer.load(shipped("nano"))
    record = encode_record(tok, "née 東", "steps", (Node("S", "7"),), "7")
    line = coloured(tok, record, 3)
    styles = {line.plain[s.start : s.end]: s.style for s in line.spans}
    assert styles[" née 東"] == "dim" and styles[THINK] == "cyan" and styles[END_THINK] == "bold green"
    assert styles[" 7"] == "green" and line.plain.startswith("3: ")


def test_a_histogram_keeps_every_record() -> None:
    lines = histogram({"1": 5, "30": 2, "7": 1})
    assert len(lines) <= 12 and sum(int(line.split()[-1]) for line in lines) == 8
    assert lines[0].split()[:3] == ["1", "to", "192"]


def test_a_base_that_arrives_right_padded_is_reported(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    found = padding(tmp_path)
    assert found["side"] == "left" and found["corrected"] is True and any("padding_side" in n for n in found["notes"])
