"""Text as a source: what a cursor restores is bit-equal, whatever the format; shares, lengths, faults, `datasets`."""

from __future__ import annotations

import ast
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, DataError, UnknownNameError
from gnomon.data import stream
from gnomon.data.corpus import StepData
from gnomon.data.encode import Encoded, encode_record
from gnomon.data.rows import Form, encode_sample
from gnomon.data.stream import TextConfig, TextSource, pack, quantile, text_source
from gnomon.data.tokenizer import Tokenizer
from gnomon.protocol.tags import END_THINK, THINK

CONTEXT = 512


def row(index: int, lines: int = 6) -> dict[str, str]:
    rng = seeds.rng("row", index)
    steps = "\n".join(f"{rng.randint(1, 99)} + {rng.randint(1, 99)} = ?" for _ in range(rng.randint(0, lines)))
    return {"prompt": f"item {index} of many", "response": f"{THINK}{steps}{END_THINK}\n\nThe answer is {index}."}


def write(folder: Path, kind: str, rows: list[dict[str, str]], name: str = "a") -> Path:
    path = folder / f"{name}.{kind}"
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(_table(rows), path, row_group_size=70)
    else:
        pa = pytest.importorskip("pyarrow")
        with pa.ipc.new_stream(str(path), _table(rows).schema) as out:
            out.write_table(_table(rows), max_chunksize=60)
    return path


def _table(rows: list[dict[str, str]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


KINDS = ("jsonl", "jsonl.gz", "parquet", "arrow")


def source(
    tok: Tokenizer, *files: Path, rows: int = 3, context: int = CONTEXT, extra: Any = None, **more: Any
) -> TextSource:
    values = {"columns": {"completion": "response"}, "shuffle": 37, "probe": 50, **more}
    config = TextConfig(files=tuple(map(str, files)), **values)
    return text_source(config, tok, rows, context, "seed", extra=extra)


def same(a: StepData, b: StepData) -> None:
    assert (a.length, a.cursor, a.counts, len(a.rows)) == (b.length, b.cursor, b.counts, len(b.rows))
    for x, y in zip(a.rows, b.rows, strict=True):
        assert x.sizes == y.sizes and np.array_equal(x.ids, y.ids) and np.array_equal(x.loss, y.loss)


def over_the_wire(cursor: Any) -> Any:
    return json.loads(json.dumps(cursor))


def numbers(tok: Tokenizer, data: StepData) -> list[int]:
    """Which items a step shows."""
    return [
        int(p.split("item ")[1].split(" of")[0])
        for r in data.rows
        for p in tok.decode(r.ids.tolist()).split("<bos>")[1:]
    ]


def made(name: str, tok: Tokenizer, folder: Path) -> Callable[[], TextSource]:
    """Makers of sources over 230 rows."""
    rows = [row(i) for i in range(230)]
    if name in KINDS:
        path = write(folder, name, rows)
        return lambda: source(tok, path)
    at = range(0, 230, 60)
    parts = [write(folder, kind, rows[a : a + 60], f"part{a}") for kind, a in zip(KINDS, at, strict=True)]
    if name == "four files":
        return lambda: source(tok, *parts)
    weights = {parts[0].name: 2.0, parts[2].name: 0.5, "tasks": 1.0}

    def task(i: int) -> Encoded:
        return encode_record(tok, f"item {1000 + i} of tasks", "direct", (), "yes")

    return lambda: source(tok, *parts, weights=weights, extra=task, too_long="cut", max_len=128)


@pytest.mark.parametrize("name", [*KINDS, "four files", "a mix"])
def test_a_cursor_restores_every_format_exactly(name: str, tok: Tokenizer, tmp_path: Path) -> None:
    make = made(name, tok, tmp_path)
    unbroken = make()
    steps = [unbroken.step(k) for k in range(60)]
    assert steps[-1].counts["data/epoch"] >= 1
    for at in [1, 59, *seeds.rng("cursors", name).sample(range(2, 59), 10)]:
        again = make()
        again.seek(at, over_the_wire(steps[at - 1].cursor))
        for k in range(at, min(at + 3, 60)):
            same(again.step(k), steps[k])
        again.close()
    same(make().step(23), steps[23])  # skipping forward from the start
    unbroken.seek(7, over_the_wire(steps[6].cursor))  # backwards, in a source in use
    same(unbroken.step(9), steps[9])
    same(unbroken.step(2), steps[2])
    unbroken.seek(0, {})
    same(unbroken.step(0), steps[0])
    unbroken.close()


def test_all_formats_give_the_same_records(tok: Tokenizer, tmp_path: Path) -> None:
    rows, seen = [row(i) for i in range(50)], []
    for kind in KINDS:
        one = source(tok, write(tmp_path, kind, rows), shuffle=0, cut=0)
        seen.append([tok.decode(r.ids.tolist()) for k in range(5) for r in one.step(k).rows])
    assert seen[0] == seen[1] == seen[2] == seen[3] and len(seen[0]) == 15


def test_a_pass_shows_every_row_once_in_a_hashed_order(tok: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [row(i) for i in range(100)])
    orders = []
    for shuffle in (0, 30, 1000):
        (feed,) = source(tok, path, shuffle=shuffle)._streams
        order = [feed.next_sample()[1] - 1 for _ in range(200)]  # two passes
        assert sorted(order[:100]) == sorted(order[100:]) == list(range(100))
        orders.append(order)
    plain, blocks, all_ = orders
    assert plain == [*range(100), *range(100)]
    assert [sorted(blocks[a : a + 30]) for a in (0, 30, 60)] == [list(range(a, a + 30)) for a in (0, 30, 60)]
    assert blocks[:30] != list(range(30)) and blocks[:100] != blocks[100:]
    assert all_[:100] != list(range(100)) and all_[:100] != all_[100:]


def test_weights_are_shares_of_the_tokens(tok: Tokenizer, tmp_path: Path) -> None:
    a = write(tmp_path, "jsonl", [row(i, 20) for i in range(80)], "long")
    b = write(tmp_path, "jsonl", [row(500 + i, 1) for i in range(80)], "short")

    def task(i: int) -> Encoded:
        return encode_record(tok, f"item {1000 + i} of tasks", "direct", (), "yes")

    mix = source(tok, a, b, weights={"long.jsonl": 3, "short.jsonl": 1, "tasks": 2}, extra=task, rows=8, max_len=512)
    tokens = [0, 0, 0]
    for k in range(40):
        for r in mix.step(k).rows:
            for text, size in zip(tok.decode(r.ids.tolist()).split("<bos>")[1:], r.sizes, strict=True):
                number = int(text.split("item ")[1].split(" of")[0])
                tokens[(number >= 500) + (number >= 1000)] += size
    shares = [t / sum(tokens) for t in tokens]
    assert shares == pytest.approx([3 / 6, 1 / 6, 2 / 6], abs=0.02)
    alone = source(tok, a, extra=task)  # `tasks` is not named: the mixture is left out
    assert all(n < 500 for k in range(5) for n in numbers(tok, alone.step(k)))
    with pytest.raises(UnknownNameError, match="long"):
        source(tok, a, weights={"lnog.jsonl": 1})
    with pytest.raises(ConfigError, match="leaves no source"):
        source(tok, a, weights={"long.jsonl": 0})


def test_rows_are_whole_full_and_in_bounds(tok: Tokenizer, tmp_path: Path) -> None:
    one = source(tok, write(tmp_path, "jsonl", [row(i) for i in range(400)]), rows=8)
    filled = []
    for k in range(30):
        data = one.step(k)
        assert len(data.rows) == 8 and all(sum(r.sizes) == len(r.ids) <= data.length for r in data.rows)
        assert data.targets == sum(r.targets for r in data.rows) > 0
        filled.append(data.counts["data/fill"])
    assert sum(filled) / 30 > 0.93


def test_packing_is_complete_and_tight(tok: Tokenizer) -> None:
    rng = seeds.rng("pack")
    records = [Encoded([1] * rng.randint(5, 100), [1] * 100) for _ in range(300)]
    rows = pack(records, 128)
    assert sorted(i for r in rows for i in r) == list(range(300))
    sizes = [sum(len(records[i].ids) for i in r) for r in rows]
    assert max(sizes) <= 128 and sum(sizes) / (128 * len(rows)) > 0.93
    assert rows == sorted(rows, key=lambda r: r[0]) and all(r == sorted(r) for r in rows)


def test_the_row_length_is_probed_grows_and_is_restored(tok: Tokenizer, tmp_path: Path) -> None:
    rows = [row(i, 2) for i in range(150)] + [row(i, 40) for i in range(150, 400)]
    path = write(tmp_path, "jsonl", rows)
    one = source(tok, path, rows=8, shuffle=20, cut=0)
    steps = [one.step(k) for k in range(60)]
    lengths = [s.length for s in steps]
    sizes = [len(encode_record(tok, r["prompt"], "direct", (), "x").ids) for r in rows[:50]]
    assert lengths == sorted(lengths) and 64 <= lengths[0] < lengths[-1] <= CONTEXT and lengths[-1] % 64 == 0
    assert lengths[0] >= max(sizes)
    assert steps[-1].counts["data/too_long"] > 0  # before it had grown
    at = next(k for k in range(1, 60) if lengths[k] > lengths[k - 1])
    for k in (at, at + 1):
        again = source(tok, path, rows=8, shuffle=20, cut=0)
        again.seek(k, over_the_wire(steps[k - 1].cursor))
        same(again.step(k), steps[k])
        assert again.max_len >= lengths[at]  # not probed anew from the short rows
    assert quantile({"1": 99, "3": 1}) == 64 and quantile({"1": 98, "3": 2}) == 192 and quantile({"2": 1}) == 128
    capped = source(tok, path, context=128, shuffle=0)
    assert max(capped.step(k).length for k in range(30)) <= 128
    with pytest.raises(ConfigError, match="context is 128"):
        source(tok, path, context=128, max_len=256)


def test_records_above_the_row_are_dropped_or_cut(tok: Tokenizer, tmp_path: Path) -> None:
    rows = [row(i, 2 if i % 2 else 40) for i in range(100)]
    path = write(tmp_path, "jsonl", rows)
    form = Form({"completion": "response"})
    long = {i for i, r in enumerate(rows) if encode_sample(tok, form.samples(r)[0][0])[1] > 100}
    assert 20 < len(long) < 60
    shown = {}
    for too_long in ("drop", "cut"):
        one = source(tok, path, max_len=100, shuffle=0, cut=0, too_long=too_long)
        shown[too_long] = {n for k in range(30) for n in numbers(tok, one.step(k))}
        assert one.step(30).counts["data/too_long"] >= len(long)
    assert shown["drop"] == set(range(100)) - long and shown["cut"] == set(range(100))
    hopeless = write(tmp_path, "jsonl", [{"prompt": "word " * 500, "response": "x"}] * 3, "hopeless")
    with pytest.raises(DataError, match=r"longer than 64 tokens.*raise text.max_len"):
        source(tok, hopeless, max_len=64).step(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_breaks_while_it_is_read_is_named(kind: str, tok: Tokenizer, tmp_path: Path) -> None:
    rows = [row(i) for i in range(3000)]

    def broken(damage: Callable[[Path], object], wanted: str) -> None:
        path = write(tmp_path, kind, rows)
        one = source(tok, path, shuffle=20)
        one.step(0)
        damage(path)
        with pytest.raises(DataError, match=wanted) as error:
            for k in range(1, 2000):
                assert one.step(k).counts["data/epoch"] == 0
        assert path.name in str(error.value) and any(w in str(error.value) for w in ("byte", "row"))

    size = write(tmp_path, kind, rows).stat().st_size
    broken(lambda p: os.truncate(p, size // 2), "shrank|ends at|damaged")
    broken(lambda p: p.unlink(), "vanished")
    broken(lambda p: p.replace(p.with_suffix(".old")) and write(tmp_path, kind, rows), "replaced")

    def garbage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes((i * 37 + i * i) % 256 for i in range(size - size // 2)))

    broken(garbage, "rows are bad|damaged|a.arrow, byte")


def test_what_is_written_behind_an_open_file_waits_for_the_next_start(tok: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [row(i) for i in range(60)])
    one = source(tok, path, shuffle=10, rows=1, max_len=256)
    found = numbers(tok, one.step(0))
    with path.open("a") as file:
        file.write(json.dumps(row(999)) + "\n")
    while len(found) < 55:
        found += numbers(tok, one.step(one._step))
    assert 999 not in found


def test_another_config_takes_effect_on_resume(tok: Tokenizer, tmp_path: Path) -> None:
    a, b = (write(tmp_path, "jsonl", [row(i + at) for i in range(90)], n) for n, at in (("a", 0), ("b", 500)))
    one = source(tok, a, b, weights={"a.jsonl": 1, "b.jsonl": 1})
    cursor = over_the_wire([one.step(k) for k in range(6)][-1].cursor)
    only = source(tok, a)
    only.seek(6, cursor)
    assert all(n < 500 for n in numbers(tok, only.step(6)))
    mostly = source(tok, a, b, weights={"a.jsonl": 0.01, "b.jsonl": 1})
    mostly.seek(6, cursor)
    shown = [n for k in range(6, 12) for n in numbers(tok, mostly.step(k))]
    assert sum(n >= 500 for n in shown) / len(shown) > 0.9  # at once, and without making up for the past
    for change in ({"shuffle": 5}, {"shuffle": 0}, {"max_len": 320}, {"too_long": "cut"}):
        other = source(tok, a, b, weights={"a.jsonl": 1, "b.jsonl": 1}, **change)
        other.seek(6, cursor)
        assert other.step(6).rows and other.step(7).length in (320, one.max_len)
    for wrong in ({"chunk": 3}, {"chunk": {}, "taken": 1}, {**cursor, "taken": "x"}):
        with pytest.raises(DataError, match="cannot be read"):
            source(tok, a, b).seek(6, wrong)
    c = write(tmp_path, "jsonl", [row(i) for i in range(700)], "c")
    deep = source(tok, c)
    cursors = [over_the_wire(deep.step(k).cursor) for k in range(40)]
    cursor = next(x for x in cursors if x["chunk"]["places"][str(c)]["at"])
    write(tmp_path, "jsonl", [row(1)], "c")
    with pytest.raises(DataError, match=r"c\.jsonl has \d+ bytes, but the run stood at \d+"):
        source(tok, c).seek(11, cursor)


def test_the_fingerprint_follows_the_data(tok: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [row(i) for i in range(60)])
    first = source(tok, path).fingerprint
    assert first == source(tok, path, shuffle=3, rows=5).fingerprint
    write(tmp_path, "jsonl", [row(i) for i in range(61)])
    assert source(tok, path).fingerprint != first


def test_a_command_line_writes_pairs_and_lists() -> None:
    config = TextConfig.model_validate(
        {"files": "a.jsonl, b.parquet", "columns": "prompt=q,completion=a", "weights": "x=y.jsonl=2"}
    )
    assert config.files == ("a.jsonl", "b.parquet") and config.columns == {"prompt": "q", "completion": "a"}
    assert config.weights == {"x=y.jsonl": 2.0} and config.given and not TextConfig().given
    for wrong in ({"columns": "prompt"}, {"weights": {"a": -1}}, {"weights": {"a": float("nan")}}, {"max_len": 3}):
        with pytest.raises(ValueError):
            TextConfig.model_validate(wrong)


# -- the package `datasets` -------------------------------------------------------------------------------------------
def test_rows_of_the_package_datasets_are_read_in_all_its_formats(tok: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [row(i) for i in range(120)]
    data = datasets.Dataset.from_list(rows)
    data.to_json(str(tmp_path / "d.jsonl"))
    data.to_parquet(str(tmp_path / "d.parquet"))
    data.save_to_disk(str(tmp_path / "disk"))
    (arrow,) = (tmp_path / "disk").glob("*.arrow")
    plain = write(tmp_path, "jsonl", rows)

    def shown(path: Path) -> list[str]:
        one = source(tok, path, shuffle=0, cut=0)
        return [tok.decode(r.ids.tolist()) for k in range(8) for r in one.step(k).rows]

    wanted = shown(plain)
    assert all(shown(path) == wanted for path in (tmp_path / "d.jsonl", tmp_path / "d.parquet", arrow))


def test_a_streamed_data_set_takes_the_same_path(tok: Tokenizer, tmp_path: Path) -> None:
    """`load_dataset(…, streaming=True)` of a local folder: what the Hub gives, without the Hub."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    rows = [row(i) for i in range(150)]
    path = write(tmp_path / "set", "jsonl", rows, "train")

    def streamed(**more: Any) -> TextSource:
        return source(tok, dataset=str(tmp_path / "set"), **more)

    by_file, by_set = source(tok, path, shuffle=0, cut=0), streamed(shuffle=0, cut=0)
    for k in range(6):
        a, b = by_file.step(k), by_set.step(k)
        assert [r.ids.tolist() for r in a.rows] == [r.ids.tolist() for r in b.rows]
    unbroken = streamed()
    steps = [unbroken.step(k) for k in range(40)]
    assert steps[-1].counts["data/epoch"] >= 1
    for at in (1, 11, 24, 39):
        again = streamed()
        again.seek(at, over_the_wire(steps[at - 1].cursor))
        same(again.step(at), steps[at])


def test_without_hub_or_package_the_local_toggle_is_named(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'glaiveai/reasoning-v1-20m' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"reasoning-v1-20m.*--text.files"):
        source(tok, dataset="glaiveai/reasoning-v1-20m").step(0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"gnomon\[data\].*--text.files"):
        source(tok, dataset="glaiveai/reasoning-v1-20m").step(0)
    with pytest.raises(ConfigError, match="no text is named"):
        source(tok)


def test_jsonl_needs_no_further_package(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ("datasets", "pyarrow", "pandas")
    for name in extra:
        monkeypatch.setitem(sys.modules, name, None)
    assert source(tok, write(tmp_path, "jsonl", [row(1), row(2)])).step(3).rows
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"need pyarrow: pip install 'gnomon\[data\]'"):
        source(tok, tmp_path / "a.parquet")
    for path in Path(stream.__file__).parent.glob("*.py"):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        assert not {n.split(".")[0] for n in names} & set(extra), path.name


@pytest.mark.slow
def test_two_gigabytes_take_constant_memory(tok: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    block = "".join(json.dumps(row(i, 800)) + "\n" for i in range(2_000)).encode()
    with path.open("wb") as file:
        while file.tell() < 2 * 10**9:
            file.write(block)
    one = source(tok, path, shuffle=1000, rows=8)
    one.step(0)
    (feed,) = one._streams
    process, count = psutil.Process(), 0
    before = peak = process.memory_info().rss
    while feed.epoch == 0:  # all rows, judged but not encoded
        feed.next_sample()
        count += 1
        if count % 500 == 0:
            peak = max(peak, process.memory_info().rss)
    grown = (peak - before) / 2**20
    assert grown < 64, f"{grown:.0f} MB"
