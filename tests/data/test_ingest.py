"""Dirty files (reliability.md S7): no crash, every row counted as used, escaped or quarantined, memory bounded."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gnomon.base.errors import ConfigError, DataError
from gnomon.data.readers import open_file
from gnomon.data.rows import Form, encode_sample, nodes_of
from gnomon.data.stream import TextConfig, text_source
from gnomon.data.survey import Survey, survey
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.tags import (
    ANSWER,
    BOS,
    END_ANSWER,
    END_THINK,
    EOS,
    PAD,
    PARENT_TOKEN,
    PLAN,
    STRUCTURE_TOKENS,
    TAGS,
    THINK,
)  # fmt: skip

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GOOD = {"prompt": "Compute 3 + 4.", "completion": f"{THINK}3 + 4 = 7{END_THINK}7"}
LINE = json.dumps(GOOD).encode()
MB = 2**20


def chat(*turns: Any) -> bytes:
    return json.dumps({"messages": list(turns)}).encode()


USER, SAYS = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def pair(prompt: str, completion: str, **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion, **more}).encode()


# name -> (one line, what becomes of it, a piece of the reason)
ROWS: dict[str, tuple[bytes, str, str]] = {
    "a good pair": (LINE, "used", ""),
    "blank lines are no rows": (b"   ", "nothing", ""),
    "windows line end": (LINE + b"\r", "used", ""),
    "unknown columns beside": (pair("a", "b", id=3, meta={"x": [1, {"y": None}]}), "used", ""),
    "characters of four bytes": (json.dumps({"text": "東京 🙂 ﷽"}, ensure_ascii=False).encode(), "used", ""),
    "a full surrogate pair": (b'{"text": "\\ud83d\\ude42"}', "used", ""),
    "not UTF-8": (b'{"text": "caf\xe9"}', "quarantined", "not UTF-8"),
    "an overlong encoding": (b'{"text": "\xc0\xaf"}', "quarantined", "not UTF-8"),
    "a raw surrogate": (b'{"text": "\xed\xa0\x80"}', "quarantined", "not UTF-8"),
    "a lone surrogate escape": (b'{"text": "\\ud83d"}', "quarantined", "surrogate"),
    "a NUL byte": (b'{"text": "a\x00b"}', "quarantined", "NUL"),
    "an escaped NUL": (b'{"text": "a\\u0000b"}', "quarantined", "NUL"),
    "UTF-16": (LINE.decode().encode("utf-16"), "quarantined", "UTF-16"),
    "a BOM in the middle": (b"\xef\xbb\xbf" + LINE, "quarantined", "not JSON"),
    "a duplicate key": (b'{"text": "a", "text": "b"}', "quarantined", "twice"),
    "a duplicate key inside": (b'{"text": "a", "m": {"x": 1, "x": 2}}', "quarantined", "twice"),
    "NaN": (b'{"text": "a", "score": NaN}', "quarantined", "NaN"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "quarantined", "Infinity"),
    "1e999": (b'{"text": "a", "score": 1e999}', "quarantined", "too large"),
    "an endless integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "quarantined", "not JSON"),
    "a depth bomb": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "quarantined", "nested"),
    "a list": (b"[1, 2]", "quarantined", "object"),
    "a number": (b"3", "quarantined", "object"),
    "half a line": (LINE[:30], "quarantined", "not JSON"),
    "two objects on a line": (LINE + LINE, "quarantined", "not JSON"),
    "a number for a text": (b'{"text": 3}', "quarantined", "is a int"),
    "true for a text": (b'{"prompt": "a", "completion": true}', "quarantined", "is a bool"),
    "null for everything": (b'{"text": null}', "quarantined", "no messages"),
    "no known column": (b'{"promt": "a", "completoin": "b"}', "quarantined", "did you mean"),
    "an empty answer": (pair("a", "  "), "quarantined", "empty"),
    "no answer": (b'{"prompt": "a"}', "quarantined", "missing"),
    "a row of 1.1 MB": (json.dumps({"text": "x" * (MB + 100_000)}).encode(), "quarantined", "longer than"),
    "a think block never closed": (pair("a", f"{THINK}well"), "quarantined", "not closed"),
    "a think block never opened": (pair("a", f"well{END_THINK}b"), "quarantined", "never opened"),
    "nothing behind the thought": (pair("a", f"{THINK}b{END_THINK}"), "quarantined", "nothing behind"),
    "two thoughts": (pair("a", f"{THINK}b{END_THINK}c", reasoning="d"), "quarantined", "a thought both"),
    "two thought columns": (pair("a", "c", reasoning="d", thinking="e"), "quarantined", "both 'reasoning'"),
    "a tag in the prompt": (pair(f"say {END_THINK} now", "b"), "escaped", ""),
    "a tag behind the thought": (pair("a", f"{THINK}b{END_THINK}c {THINK}d"), "escaped", ""),
    "a control token in a text": (json.dumps({"text": f"x {EOS}{PARENT_TOKEN} y"}).encode(), "escaped", ""),
    "an unknown role": (chat({"role": "wizard", "content": "hi"}, SAYS), "quarantined", "role"),
    "no assistant": (chat(USER), "quarantined", "no assistant"),
    "an answer to nothing": (chat(SAYS), "quarantined", "in front of it"),
    "content as a list": (chat({"role": "user", "content": [{"type": "text"}]}, SAYS), "quarantined", "is a list"),
    "messages as a text": (b'{"messages": "hi"}', "quarantined", "no list"),
    "200 messages": (chat(*[USER, SAYS] * 100), "quarantined", "at most"),
    "a conversation whose turns repeat a megabyte": (
        chat(USER | {"content": "x" * 500_000}, *[SAYS, USER] * 30), "quarantined", "longer than",
    ),
}  # fmt: skip


def one(path: Path, tok: Tokenizer, **config: Any) -> Survey:
    return survey(TextConfig(files=(str(path),), **config), tok)[0]


def test_there_are_more_than_forty_kinds() -> None:
    assert len(ROWS) + len(FILES) + len(FAULTS) >= 55


@pytest.mark.parametrize("name", ROWS)
def test_a_dirty_row_is_counted_and_its_neighbours_are_used(name: str, tok: Tokenizer, tmp_path: Path) -> None:
    line, fate, reason = ROWS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([LINE, line, LINE]) + b"\n")
    found = one(path, tok)
    assert found.fault is None
    assert (found.quarantined, found.escaped) == (fate == "quarantined", fate == "escaped")
    assert found.used == 2 + (fate in ("used", "escaped"))
    assert all(reason in why for why in found.reasons)
    assert bool(found.reasons) == (fate == "quarantined")
    control = set(tok.control)
    allowed = {tok.bos, tok.eos, tok.think, tok.end_think, tok.answer, tok.end_answer, *tok.plan.values()}
    for record in found.shown:
        inner = [i for i in record.ids if i in control - allowed - {tok.kinds["S"]}]
        assert not inner and sum(i == tok.end_think for i in record.ids) <= 1 and len(record.ids) == len(record.loss)


def test_tag_rows_can_be_quarantined(tok: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    spelt = [*TAGS, *STRUCTURE_TOKENS, BOS, EOS, PAD]
    path.write_bytes(b"\n".join([LINE, *(pair(f"what is {tag}?", "b") for tag in spelt)]))
    found = one(path, tok)
    assert (found.used, found.escaped, found.quarantined) == (1 + len(spelt), len(spelt), 0)
    found = one(path, tok, on_tags="quarantine")
    assert (found.used, found.escaped, found.quarantined) == (1, 0, len(spelt))


def test_no_spelling_of_a_tag_becomes_its_id(tok: Tokenizer) -> None:
    for tag in (*TAGS, *STRUCTURE_TOKENS, BOS, EOS, PAD):
        for text in (tag, f" {tag}", f"a{tag}b", tag * 3, f"{tag[:-1]} >", f"▁{tag}"):
            (sample,), _ = Form({}).samples({"prompt": text, "completion": f"{THINK}x{END_THINK}y {text}"})
            ids = encode_sample(tok, sample)[0].ids
            tags = [i for i in ids if i in tok.control]
            wanted = [tok.bos, tok.plan["steps"], tok.think, tok.kinds["S"], tok.end_think, tok.answer]
            assert tags == [*wanted, tok.end_answer, tok.eos], text


# -- whole files ------------------------------------------------------------------------------------------------------
def _gz(lines: int) -> Callable[[Path], None]:
    return lambda p: p.with_suffix(".jsonl.gz").write_bytes(gzip.compress((LINE + b"\n") * lines)) and None


def _table(**columns: Any) -> Callable[[Path], None]:
    return lambda p: pq.write_table(pa.table(columns), p.with_suffix(".parquet"))


def _arrow(table: Any, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with pa.ipc.new_stream(str(path.with_suffix(".arrow")), table.schema, **options) as out:
            out.write_table(table, max_chunksize=3)

    return write


def _arrow_file(path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as out:
        out.write_table(table)


ZSTD = {"options": pa.ipc.IpcWriteOptions(compression="zstd")}
BAD_TEXT = pa.array([b"caf\xe9", b"fine", b"a\0b"], pa.binary()).cast(pa.string(), safe=False)
TURNS = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "reasoning_content": "so"}]] * 4
# name -> (how it is written, rows used, rows quarantined)
FILES: dict[str, tuple[Callable[[Path], None], int, int]] = {
    "a BOM at the start": (lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINE) and None, 1, 0),
    "no newline at the end": (lambda p: p.write_bytes(LINE + b"\n" + LINE) and None, 2, 0),
    "an empty file": (lambda p: p.write_bytes(b""), 0, 0),
    "UTF-16 altogether": (lambda p: p.write_bytes(((LINE + b"\n") * 3).decode().encode("utf-16")) and None, 0, 4),
    "one JSON array": (lambda p: p.write_text(json.dumps([GOOD, GOOD], indent=0)) and None, 0, 10),
    "gzip": (_gz(20), 20, 0),
    "parquet": (_table(prompt=["a", "b"], completion=["c", None]), 1, 1),
    "parquet, bad texts": (_table(text=BAD_TEXT), 1, 2),
    "parquet, messages": (_table(messages=TURNS), 4, 0),
    "parquet, a text of 2 MB": (_table(text=["a", "x" * 2 * MB, "b"]), 2, 1),
    "parquet, dictionary column": (_table(text=pa.array(["a", "b", "a"]).dictionary_encode()), 3, 0),
    "arrow stream": (_arrow(pa.table({"text": list("abcdefgh")})), 8, 0),
    "arrow file": (_arrow_file, 2, 0),
    "arrow, zstd": (_arrow(pa.table({"text": ["abc" * 100] * 8}), **ZSTD), 8, 0),
    "arrow, bad texts": (_arrow(pa.table({"text": BAD_TEXT})), 1, 2),
    "arrow, messages": (_arrow(pa.table({"messages": TURNS})), 4, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_or_counted(name: str, tok: Tokenizer, tmp_path: Path) -> None:
    write, used, bad = FILES[name]
    write(tmp_path / "a.jsonl")
    (path,) = tmp_path.iterdir()
    found = one(path, tok)
    assert (found.fault, found.used, found.quarantined) == (None, used, bad)


def _cut(write: Callable[[Path], None], end: float = 0.6) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        write(path)
        (found,) = path.parent.iterdir()
        data = found.read_bytes()
        found.write_bytes(data[: int(end * len(data)) if end > 0 else int(end)])

    return made


def _noise(write: Callable[[Path], None], start: int = 40) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        write(path)
        (found,) = path.parent.iterdir()
        data = bytearray(found.read_bytes())
        for i in range(start, len(data) - 8):
            data[i] = (data[i] * 31 + i * i * 7) % 256
        found.write_bytes(data)

    return made


ROWS_OF_TEXT = pa.table({"text": [f"row {i} " * 20 for i in range(300)]})
# name -> (how it is written, a piece of the one clear error)
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a gzip bomb": (
        lambda p: p.with_suffix(".jsonl.gz").write_bytes(gzip.compress((b"x" * 1_200_000 + b"\n") * 15)) and None,
        "unpacks to",
    ),
    "gzip cut": (_cut(_gz(500)), "damaged or cut"),
    "gzip that is none": (lambda p: p.with_suffix(".jsonl.gz").write_bytes(b"hello") and None, "damaged"),
    "parquet cut": (_cut(_table(text=["a"] * 100)), "damaged"),
    "parquet noise": (_noise(lambda p: pq.write_table(ROWS_OF_TEXT, p.with_suffix(".parquet"))), "damaged"),
    "parquet that is none": (lambda p: p.with_suffix(".parquet").write_bytes(b"PAR1" * 9) and None, "damaged"),
    "parquet, nested": (_table(text=[{"a": {"b": 1}}] * 3), "is a struct"),
    "parquet, lists of lists": (_table(messages=[[["a"]]] * 3), "is a list"),
    "parquet, other columns": (_table(question=["a"]), "none of the wanted"),
    "parquet, a page of 20 MB": (
        lambda p: pq.write_table(pa.table({"text": ["x" * 20 * MB]}), p.with_suffix(".parquet"), compression="zstd"),
        "unpacks from",
    ),
    "arrow cut": (_cut(_arrow(ROWS_OF_TEXT)), "byte"),
    "arrow noise": (_noise(_arrow(ROWS_OF_TEXT), 400), "a.arrow"),
    "arrow that is none": (lambda p: p.with_suffix(".arrow").write_bytes(b"hello, text") and None, "no Arrow file"),
    "arrow, empty": (lambda p: p.with_suffix(".arrow").write_bytes(b""), "no Arrow file"),
    "arrow without its end mark": (_cut(_arrow(ROWS_OF_TEXT), -8), "or cut"),
    "arrow, dictionary column": (
        _arrow(pa.table({"text": pa.array(["a", "b"]).dictionary_encode()})), "plain texts",
    ),
    "arrow bomb": (_arrow(pa.table({"text": ["x" * 20 * MB]}), **ZSTD), "unpacks to more"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_file_is_one_clear_error(name: str, tok: Tokenizer, tmp_path: Path) -> None:
    write, reason = FAULTS[name]
    write(tmp_path / "a.jsonl")
    (path,) = tmp_path.iterdir()
    found = one(path, tok)
    assert found.fault is not None and reason in found.fault and path.name in found.fault
    source = text_source(TextConfig(files=(str(path),), shuffle=0, bad_share=1, max_len=256), tok, 2, 256, "s")
    with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
        for step in range(10**6):  # an endless source: the fault must end it, whatever was readable in front
            source.step(step)


def test_flipped_bytes_never_crash(tok: Tokenizer, tmp_path: Path) -> None:
    """Every 7th byte of small Arrow and Parquet files, flipped one at a time."""
    for write in (_arrow(pa.table({"text": ["abc", "d"]})), _table(text=["abc", "d"])):
        write(tmp_path / "a.jsonl")
        (path,) = tmp_path.iterdir()
        data = path.read_bytes()
        for at in range(0, len(data), 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            found = one(path, tok)
            assert found.fault or found.used + found.quarantined in range(3), at
        path.unlink()


def test_a_parquet_bomb_stays_small(tmp_path: Path) -> None:
    """150 MB of text from 50 kB: rows of a megabyte, all the same, arrive one after the other."""
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": pa.array(["y" * 1_000_000] * 150).dictionary_encode()}), path)
    assert path.stat().st_size < 100_000
    reader, total = open_file(path, ("text",)), 0
    reader.seek(None)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    highest = 0
    for _ in range(150):
        total += len(next(reader).value["text"])
        highest = max(highest, pool.bytes_allocated() - before)
    assert total == 150_000_000 and highest < 16 * MB


def test_quarantined_rows_are_named_once_and_too_many_stop(tok: Tokenizer, tmp_path: Path) -> None:
    path, named = tmp_path / "a.jsonl", tmp_path / "run" / "quarantine.jsonl"
    lines = [LINE] * 300
    lines[17], lines[220] = b'{"text": "a\xff"}', b"nonsense " * 100
    path.write_bytes(b"\n".join(lines))
    config = TextConfig(files=(str(path),), shuffle=50, max_len=64)
    for _ in range(2):  # a run and its resumption
        source = text_source(config, tok, 4, 64, "s", quarantine=named)
        counts = [source.step(k).counts for k in range(40)][-1]  # more than one pass
        assert counts["data/epoch"] > 0 and counts["data/quarantined"] >= 2
        source.close()
    rows = [json.loads(line) for line in named.read_text().splitlines()]
    assert [(r["file"], r["row"]) for r in rows] == [(str(path), 18), (str(path), 221)]
    assert "not UTF-8" in rows[0]["reason"] and "\\xff" in rows[0]["text"] and len(rows[1]["text"]) == 200
    lines[5] = lines[6] = b"{}"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"of 200 rows are bad, more than 1.0%"):
        text_source(config, tok, 4, 64, "s").step(100)
    # Below 200 rows a share says little, but a source without any usable row is an error.
    path.write_bytes(b"{}\n" * 50)
    with pytest.raises(DataError, match="no usable row"):
        text_source(config, tok, 4, 64, "s").step(0)


def test_forms_and_masks(tok: Tokenizer) -> None:
    """What is given has loss 0, what is thought and answered 1."""

    def shown(row: Any, **form: Any) -> list[tuple[str, str]]:
        samples, _ = Form(**{"columns": {}, **form}).samples(row)
        records = [encode_sample(tok, s)[0] for s in samples]
        pick = lambda r, on: tok.decode([i for i, m in zip(r.ids, r.loss, strict=True) if m == on])  # noqa: E731
        return [(pick(r, 0), pick(r, 1)) for r in records]

    s = tok.control[tok.kinds["S"]]
    steps, direct = PLAN["steps"], PLAN["direct"]
    wanted = [(f"{BOS} Q{steps}{THINK}{ANSWER}", f"{s} a{s} b{END_THINK} 7{END_ANSWER}{EOS}")]
    thought = "a\n\nb"
    assert shown({"prompt": "Q", "completion": f"{THINK}\n{thought}\n{END_THINK}\n\n7"}) == wanted
    assert (
        shown({"q": "Q", "r": "7", "t": thought}, columns={"prompt": "q", "completion": "r", "reasoning": "t"})
        == wanted
    )
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": "7", name: thought}
        assert shown({"messages": [{"role": "user", "content": "Q"}, turn]}) == wanted
        assert shown({"prompt": "Q", "completion": "7", name: thought}) == wanted
    own = f"{PLAN['verify']}{THINK}S1 a\nM2<1 b{END_THINK}{ANSWER}7{END_ANSWER}"
    assert nodes_of("S1 a\nM2<1 b")[1].kind == "M"
    ((given, trained),) = shown({"prompt": "Q", "completion": own})
    assert PLAN["verify"] in given and tok.control[tok.kinds["M"]] in trained
    assert shown({"prompt": "Q", "completion": "7"})[0][0] == f"{BOS} Q{direct}{THINK}{ANSWER}"
    assert shown({"text": "Once upon"}) == [(BOS, f" Once upon{EOS}")]
    two = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"{THINK}hm{END_THINK}A"}, USER, SAYS]
    dropped, kept = (shown({"messages": two}, history_think=h) for h in ("drop", "keep"))
    assert len(dropped) == 2 and dropped[1][0].startswith(f"{BOS} Q\n\nA\n\nhi{direct}") and "hm\n\nA" in kept[1][0]


def test_a_record_above_the_room_is_cut_like_a_thought_or_a_text(tok: Tokenizer) -> None:
    (sample,), _ = Form({}).samples({"prompt": "Q", "completion": f"{THINK}{'1 2 3 ' * 50}{END_THINK}7"})
    whole, size = encode_sample(tok, sample)
    assert size == len(whole.ids) > 60
    for room in (60, size - 1):
        cut, natural = encode_sample(tok, sample, room=room)
        at = cut.ids.index(tok.end_think)
        assert natural == size and room - 1 <= len(cut.ids) <= room
        assert cut.ids[:at] == whole.ids[:at] and cut.ids[at:] == whole.ids[-len(cut.ids) + at :]
        assert not any(cut.loss[: at + 2]) and all(cut.loss[at + 2 :])  # the answer alone is trained
    (text,), _ = Form({}).samples({"text": "1 2 3 " * 50})
    cut, natural = encode_sample(tok, text, room=20)
    assert len(cut.ids) == 20 < natural and tok.eos not in cut.ids
    (hopeless,), _ = Form({}).samples({"prompt": "1 2 3 " * 50, "completion": "7"})
    assert len(encode_sample(tok, hopeless, room=20)[0].ids) > 20


def test_bad_configs_are_named() -> None:
    with pytest.raises(ConfigError, match="role in text.columns"):
        Form({"answr": "x"})
    with pytest.raises(ConfigError, match="does not exist"):
        open_file(Path("/nowhere/a.jsonl"), ())
    with pytest.raises(ConfigError, match="ends in"):
        open_file(Path(os.__file__), ())
