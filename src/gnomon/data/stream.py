"""Text of other people as a `Source`: local files and streamed data sets, mixed by weights, packed into rows.

Everything behind the readers is one path, whatever the format. The rows of step k depend on config, data and k alone.
Rows are packed in chunks: records of about 32 rows are drawn, fitted by decreasing length, and given in their order.
The cursor is the place in front of a chunk and how many of its rows are gone; `seek` draws the chunk again.
Legend: T row length in ids, which starts at the 99th percentile of the first records and only grows.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from gnomon.base.config import Config
from gnomon.base.errors import ConfigError, DataError, unknown
from gnomon.data.corpus import PackedRow, StepData
from gnomon.data.encode import Encoded
from gnomon.data.feeds import Feed, Indexed, Reading, Stream
from gnomon.data.ingest import Quarantine
from gnomon.data.readers import Hub, open_file
from gnomon.data.rows import Form
from gnomon.data.tokenizer import Tokenizer

CHUNK_ROWS: Final = 32
ROUND: Final = 64  # row lengths are multiples of it
QUANTILE: Final = 0.99
MAX_LOST: Final = 1_000  # records in a row that do not fit
TASKS: Final = "tasks"  # the built-in mixture, in `weights`


class TextConfig(Config):
    """Text that a run learns from, beside or instead of the built-in tasks.

    dataset: a data set that `datasets` streams, from the Hub (subset, split, revision as there). files: local .jsonl,
    .jsonl.gz, .parquet, .arrow files or patterns. columns: role -> column, where a data set has names of its own; roles
    are messages, prompt, completion, reasoning, text. weights: shares of the tokens, by file (path or name), by
    `dataset`'s name, and `tasks` for the built-in mixture, which is left out unless it is named; without weights all
    files are one source. shuffle: rows of a block, given in a hashed order; 0 = as they stand. max_len: ids of a row;
    auto = from the first `probe` records, growing. too_long: what happens to records above it; cut shortens thoughts
    as a budget would, and texts at their end. bad_share: of the rows; above it a run stops. on_tags: rows whose text
    spells a tag. history_think: thoughts of earlier turns. cut: share of the thoughts that end early (the answer alone
    is trained then).
    """

    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    files: tuple[str, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, float] = Field(default_factory=dict)
    shuffle: int = Field(default=1000, ge=0, le=100_000)
    max_len: int | Literal["auto"] = "auto"
    probe: int = Field(default=1000, ge=1, le=100_000)
    too_long: Literal["drop", "cut"] = "drop"
    bad_share: float = Field(default=0.01, ge=0, le=1)
    on_tags: Literal["escape", "quarantine"] = "escape"
    history_think: Literal["drop", "keep"] = "drop"
    cut: float = Field(default=0.2, ge=0, le=1)

    @field_validator("columns", "weights", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """`prompt=question,completion=answer` is what people write on a command line."""
        if not isinstance(value, str):
            return value
        found = {}
        for part in filter(None, (p.strip() for p in value.split(","))):
            name, equals, what = part.rpartition("=")
            if not equals:
                raise ConfigError(f"{part!r} is no pair; write prompt=question,completion=answer or a.jsonl=2,tasks=1")
            found[name.strip()] = what.strip()
        return found

    @field_validator("files", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(p.strip() for p in value.split(",") if p.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sound(self) -> TextConfig:
        Form(self.columns)
        for name, weight in self.weights.items():
            if not weight >= 0:
                raise ConfigError(f"text.weights: {name!r} weighs {weight}; write a number of 0 or more")
        if self.max_len != "auto" and self.max_len < 16:
            raise ConfigError(f"text.max_len is {self.max_len}; write auto or at least 16")
        return self

    @property
    def given(self) -> bool:
        """Whether any text is named."""
        return bool(self.dataset or self.files)


@dataclass
class _State:
    """What decides the next chunk, beside the places of the streams."""

    length: int = 0
    tokens: dict[str, int] | None = None  # given so far, by stream
    sizes: dict[str, int] | None = None  # records by length, in units of 64
    too_long: int = 0
    records: int = 0


class TextSource:
    """`Source` over weighted streams: `rows` packed rows a step.

    context: the largest row that the model can see. Counts of a step are sums since the beginning of the data
    (`data/used`, `data/escaped`, `data/quarantined`, `data/too_long`, `data/epoch`), and of the step `data/fill`.
    """

    def __init__(self, streams: Sequence[tuple[Stream, float]], config: TextConfig, rows: int, context: int) -> None:
        self.config, self.rows, self.context = config, rows, context
        self._streams = [s for s, weight in streams if weight > 0]
        total = sum(weight for _, weight in streams)
        self._weights = {s.name: weight / total for s, weight in streams if weight > 0}
        if not self._streams:
            raise ConfigError("text.weights leaves no source; give at least one a weight above 0")
        if config.max_len != "auto" and config.max_len > context:
            raise ConfigError(f"text.max_len is {config.max_len}, but the model's context is {context}; lower it")
        self._step = 0
        self._ready = False

    @property
    def fingerprint(self) -> str:
        text = "".join(f"{s.name}\0{s.fingerprint()}\0" for s in self._streams)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def max_len(self) -> int:
        """T of the current chunk; 0 before the first step."""
        return self._state.length if self._ready else 0

    def step(self, number: int) -> StepData:
        if not self._ready or number < self._step:
            self._restart()
        while self._step < number:
            self._take()
        rows, length = self._take()
        return StepData(tuple(rows), length, self._cursor(), self._counts(rows, length))

    def seek(self, number: int, cursor: Mapping[str, Any]) -> None:
        if not cursor:
            return self._restart()
        try:
            self._restore(cursor["chunk"])
            for _ in range(int(cursor["taken"])):
                self._next_row()
            self._step = number
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, (DataError, ConfigError)):
                raise
            raise DataError(f"the checkpoint's place in the text cannot be read ({error!r}); it was changed") from None

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    # -- places -----------------------------------------------------------------------------------------------------
    def _restart(self) -> None:
        for stream in self._streams:
            stream.restore(None)
        self._state = _State(tokens={}, sizes={})
        self._begin_rows()
        self._state.length = self._first_length()
        self._before = self._snapshot()
        self._step, self._ready = 0, True

    def _begin_rows(self) -> None:
        self._chunk: list[tuple[PackedRow, int]] = []
        self._taken = 0

    def _first_length(self) -> int:
        if self.config.max_len != "auto":
            return self.config.max_len
        sizes: dict[str, int] = {}
        shares: dict[str, int] = {}
        for _ in range(self.config.probe):
            stream = self._due(shares)
            size = stream.draw(None).size
            shares[stream.name] = shares.get(stream.name, 0) + size
            count_size(sizes, size)
        for stream in self._streams:
            stream.restore(None)
        return min(self.context, quantile(sizes))

    def _snapshot(self) -> dict[str, Any]:
        s = self._state
        places = {stream.name: stream.state() for stream in self._streams}
        weights = dict(self._weights)
        sums = {"tokens": dict(s.tokens or {}), "sizes": dict(s.sizes or {})}
        return {
            "places": places,
            "weights": weights,
            "length": s.length,
            **sums,
            "too_long": s.too_long,
            "records": s.records,
        }

    def _restore(self, chunk: Mapping[str, Any]) -> None:
        for stream in self._streams:
            stream.restore(chunk["places"].get(stream.name))
        same = dict(chunk["weights"]) == self._weights
        # Another mix starts its shares anew: it shall not make up for what the old one gave.
        tokens = dict(chunk["tokens"]) if same else {}
        length = chunk["length"] if self.config.max_len == "auto" else self.config.max_len
        self._state = _State(
            min(int(length), self.context), tokens, dict(chunk["sizes"]), chunk["too_long"], chunk["records"]
        )
        self._begin_rows()
        self._before = self._snapshot()
        self._ready = True

    def _cursor(self) -> dict[str, Any]:
        return {"chunk": self._before, "taken": self._taken}

    def _counts(self, rows: Sequence[PackedRow], length: int) -> dict[str, float]:
        found: dict[str, float] = {"data/too_long": self._state.too_long, "data/max_len": length}
        for stream in self._streams:
            for name, value in stream.counts().items():
                join = max if name == "epoch" else _sum
                found[f"data/{name}"] = join(found.get(f"data/{name}", 0), value)
        return {**found, "data/fill": sum(len(row.ids) for row in rows) / (len(rows) * length)}

    # -- rows -------------------------------------------------------------------------------------------------------
    def _take(self) -> tuple[list[PackedRow], int]:
        found = [self._next_row() for _ in range(self.rows)]
        self._step += 1
        return [row for row, _ in found], max(length for _, length in found)

    def _next_row(self) -> tuple[PackedRow, int]:
        if self._taken == len(self._chunk):
            self._fill()
        self._taken += 1
        return self._chunk[self._taken - 1]

    def _due(self, given: Mapping[str, int]) -> Stream:
        """The stream that is furthest behind its share of the tokens."""
        return min(self._streams, key=lambda s: given.get(s.name, 0) / self._weights[s.name])

    def _fill(self) -> None:
        """Draw and pack the next chunk."""
        s = self._state
        assert s.tokens is not None and s.sizes is not None
        if self.config.max_len == "auto" and s.records >= self.config.probe:
            s.length = max(s.length, min(self.context, quantile(s.sizes)))
        self._before = self._snapshot()
        records: list[Encoded] = []
        tokens = lost = 0
        room = s.length if self.config.too_long == "cut" else None
        while tokens < CHUNK_ROWS * s.length:
            stream = self._due(s.tokens)
            drawn = stream.draw(room)
            size = len(drawn.record.ids)
            s.records += 1
            count_size(s.sizes, drawn.size)
            s.too_long += drawn.size > s.length
            if size > s.length:
                lost += 1
                if lost >= MAX_LOST:
                    raise DataError(
                        f"{lost} records in a row are longer than {s.length} tokens, the last with {drawn.size} "
                        f"({drawn.file}, row {drawn.row}); raise text.max_len or the model's context, or write "
                        "--text.too-long cut"
                    )
                continue
            s.tokens[stream.name] = s.tokens.get(stream.name, 0) + size
            tokens, lost = tokens + size, 0
            records.append(drawn.record)
        self._chunk = [(PackedRow.of([records[i] for i in row]), s.length) for row in pack(records, s.length)]
        self._taken = 0


def pack(records: Sequence[Encoded], length: int) -> list[list[int]]:
    """Record numbers by row, each at most `length` ids: best fit by decreasing size; rows in the order of their first
    record, records in theirs."""
    rows: list[tuple[int, list[int]]] = []  # room left, members
    for index in sorted(range(len(records)), key=lambda i: -len(records[i].ids)):
        size = len(records[index].ids)
        fitting = [i for i, (room, _) in enumerate(rows) if room >= size]
        if not fitting:
            rows.append((length - size, [index]))
            continue
        best = min(fitting, key=lambda i: rows[i][0])
        rows[best] = (rows[best][0] - size, [*rows[best][1], index])
    return sorted((sorted(members) for _, members in rows), key=lambda row: row[0])


def count_size(sizes: dict[str, int], size: int) -> None:
    """One more record of `size` ids in a table by units of 64 (keys are texts, as in JSON)."""
    unit = str(-(-size // ROUND))
    sizes[unit] = sizes.get(unit, 0) + 1


def quantile(sizes: Mapping[str, int]) -> int:
    """The 99th percentile of such a table, rounded up to 64; 64 when it is empty."""
    left = QUANTILE * sum(sizes.values())
    for unit in sorted(sizes, key=int):
        left -= sizes[unit]
        if left <= 1e-9:
            return int(unit) * ROUND
    return ROUND


def _sum(a: float, b: float) -> float:
    return a + b


def text_files(config: TextConfig) -> list[Path]:
    """The files of the config, patterns resolved and sorted. Raises ConfigError for one that matches nothing."""
    found: list[Path] = []
    for text in config.files:
        path = Path(text).expanduser()
        hits = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if path.is_dir():
            kinds = (".jsonl", ".ndjson", ".gz", ".parquet", ".arrow")
            hits = sorted(p for p in path.iterdir() if p.suffix in kinds)
        if not hits:
            raise ConfigError(f"text.files: nothing at {text!r}; give .jsonl, .jsonl.gz, .parquet or .arrow files")
        found += [p for p in hits if p not in found]
    return found


def feeds(config: TextConfig, tok: Tokenizer, seed: str, quarantine: Path | None = None) -> list[tuple[Stream, float]]:
    """(stream, weight) of files and data set. Raises ConfigError for files that cannot be, or weights of none."""
    form = Form(config.columns, config.on_tags, config.history_think)
    reading = Reading(form, seed, config.shuffle, config.cut, config.bad_share)
    paths, weights = text_files(config), dict(config.weights)
    known = [TASKS, *([config.dataset] if config.dataset else []), *map(str, paths), *(p.name for p in paths)]
    for name in weights:
        if name not in known:
            raise unknown("source in text.weights", name, known)
    found: list[tuple[Stream, float]] = []
    groups = [[p] for p in paths] if set(weights) - {TASKS, config.dataset} else ([paths] if paths else [])
    for group in groups:
        name = str(group[0]) if len(group) == 1 else "files"
        weight = weights.get(name, weights.get(group[0].name, 1.0)) if len(group) == 1 else 1.0
        readers = [open_file(p, form.names) for p in group]
        found.append((Feed(name, readers, tok, reading, Quarantine(quarantine)), weight))
    if config.dataset:
        hub = Hub(config.dataset, form.names, config.split, config.subset, config.revision)
        weight = weights.get(config.dataset, 1.0)
        found.append((Feed(config.dataset, [hub], tok, reading, Quarantine(quarantine)), weight))
    return found


def text_source(
    config: TextConfig,
    tok: Tokenizer,
    rows: int,
    context: int,
    seed: str,
    extra: Callable[[int], Encoded] | None = None,
    quarantine: Path | None = None,
    extra_fingerprint: str = "",
) -> TextSource:
    """The source of a run. extra: record `i` of the built-in mixture, taken where `weights` names `tasks`. quarantine:
    file for the rows that were refused; one process of a run writes it, the others give None."""
    if not config.given:
        raise ConfigError("no text is named: write --text.files a.jsonl,b.parquet, or --text.dataset NAME")
    streams = feeds(config, tok, seed, quarantine)
    if extra is not None and config.weights.get(TASKS):
        streams.append((Indexed(TASKS, extra, extra_fingerprint), config.weights[TASKS]))
    return TextSource(streams, config, rows, context)
