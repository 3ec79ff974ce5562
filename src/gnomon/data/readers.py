"""Rows of one file, or of a data set on the Hub, one after the other, from any place in it. Each file is read, never
mapped: one that shrinks is an error, not a dead process.

A `Reader` gives `Raw` rows; `where()` is the JSON-able place behind the last one and `seek` goes back to it.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol

from gnomon.base import strict_json
from gnomon.base.errors import ConfigError, DataError
from gnomon.data.ingest import MAX_ROW_BYTES, Raw

MAX_RATIO: Final = 100  # of compressed data
RATIO_FREE: Final = 16 * 2**20  # bytes that may come out of any file, whatever its ratio
MAX_UNPACKED: Final = 2**40
CHECK_EVERY: Final = 256  # rows between two looks at the file on disk
BOM: Final = b"\xef\xbb\xbf"


class Reader(Protocol):
    """Rows from one place."""

    name: str

    def seek(self, at: Mapping[str, Any] | None) -> None:
        """Go to a place that `where` gave; None is the start. Raises DataError when the file cannot be read."""

    def __next__(self) -> Raw:
        """The next row; StopIteration at the end. Raises DataError, naming the place, when the file broke."""

    def where(self) -> dict[str, Any]:
        """The place behind the last row."""

    def fingerprint(self) -> str:
        """Changes when the data does."""

    def close(self) -> None:
        """Release the file."""


class Watched:
    """A file as it was when it was opened. `check` raises DataError when it vanished, shrank or was replaced; what is
    written behind its end later is not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise DataError(f"cannot open {str(path)!r}: {error.strerror}; give the path of a readable file") from None
        found = os.fstat(self.file.fileno())
        self.size, self._node = found.st_size, (found.st_dev, found.st_ino)

    def check(self, place: str) -> None:
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise DataError(f"{self.path} vanished while it was read, at {place}: {error.strerror}") from None
        if (found.st_dev, found.st_ino) != self._node:
            raise DataError(f"{self.path} was replaced by another file while it was read, at {place}")
        if found.st_size < self.size:
            raise DataError(
                f"{self.path} shrank from {self.size} to {found.st_size} bytes while it was read, at {place}; "
                "restore it and resume"
            )

    def fingerprint(self) -> str:
        """Hash of the size and of 64 spread pieces of 4 KiB."""
        digest = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        for piece in range(64):
            digest.update(os.pread(self.file.fileno(), 4096, piece * max(0, self.size - 4096) // 63))
        return digest.hexdigest()

    def close(self) -> None:
        self.file.close()


def print_of(path: Path) -> str:
    """`Watched.fingerprint` of a file that is not open."""
    file = Watched(path)
    try:
        return file.fingerprint()
    finally:
        file.close()


class _Unpacked:
    """gzip under a ratio cap and a byte cap."""

    def __init__(self, file: Watched) -> None:
        self._packed = file.file
        self._path = file.path
        self._zip = gzip.GzipFile(fileobj=self._packed)
        self.out = 0

    def readline(self, size: int) -> bytes:
        try:
            raw = self._zip.readline(size)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{self._path} is damaged or cut: {error} (byte {self._packed.tell()}, {self.out} unpacked)"
            ) from None
        self.out += len(raw)
        if self.out > MAX_UNPACKED or self.out > max(RATIO_FREE, MAX_RATIO * self._packed.tell()):
            raise DataError(
                f"{self._path} unpacks to {self.out} bytes from {self._packed.tell()}: more than {MAX_RATIO} times its "
                "size, or too large; unpack it yourself when it is meant"
            )
        return raw


class Lines:
    """JSONL, plain or gzipped (`.gz`). Lines above 1 MiB and lines that are not strict JSON become bad rows."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._file: Watched | None = None
        self._byte = self._line = 0

    def seek(self, at: Mapping[str, Any] | None) -> None:
        self.close()
        self._byte, self._line = (int(at["byte"]), int(at["line"])) if at else (0, 0)
        self._file = Watched(self.path)
        self._packed = _Unpacked(self._file) if self.path.suffix == ".gz" else None
        if self._packed:
            while self._packed.out < self._byte:
                if not self._packed.readline(min(MAX_ROW_BYTES, self._byte - self._packed.out)):
                    raise DataError(f"{self.path} ends at byte {self._packed.out}, before {self._byte}: it has changed")
        elif self._byte > self._file.size:
            raise DataError(f"{self.path} has {self._file.size} bytes, but the run stood at {self._byte}: it was cut")
        else:
            self._file.file.seek(self._byte)

    def _line_of(self, size: int) -> bytes:
        assert self._file is not None
        if self._packed:
            return self._packed.readline(size)
        left = self._file.size - self._byte
        raw = self._file.file.readline(min(size, left))
        if not raw and left:
            self._file.check(f"byte {self._byte}")
            raise DataError(f"{self.path} ends at byte {self._byte}, but had {self._file.size} bytes at first")
        return raw

    def __next__(self) -> Raw:
        if self._file is None:
            self.seek(None)
        assert self._file is not None
        while True:
            if self._line % CHECK_EVERY == 0:
                self._file.check(f"byte {self._byte}, line {self._line + 1}")
            raw = self._line_of(MAX_ROW_BYTES + 1)
            if not raw:
                raise StopIteration
            start, whole = self._byte, len(raw) <= MAX_ROW_BYTES
            self._line += 1
            self._byte += len(raw)
            if not whole:
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = self._line_of(MAX_ROW_BYTES)
                    self._byte += len(rest)
                return Raw(self._line, reason=f"longer than {MAX_ROW_BYTES} bytes", source=raw[:1024])
            if start == 0:
                raw = raw.removeprefix(BOM)
            if raw.strip():
                return _parsed(self._line, raw)

    def where(self) -> dict[str, Any]:
        return {"byte": self._byte, "line": self._line}

    def fingerprint(self) -> str:
        return print_of(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _parsed(number: int, raw: bytes) -> Raw:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Raw(number, reason="UTF-16; write UTF-8", source=raw[:1024])
    if b"\0" in raw:
        return Raw(number, reason="a NUL byte", source=raw[:1024])
    try:
        return Raw(number, strict_json.loads(raw), source=raw[:1024])
    except DataError as error:
        return Raw(number, reason=str(error), source=raw[:1024])


class Hub:
    """A data set that `datasets` streams (from the Hub, or from a folder that it can read)."""

    def __init__(
        self, dataset: str, names: Sequence[str], split: str, subset: str | None = None, revision: str | None = None
    ) -> None:
        self.name, self._names = dataset, names
        self._args: dict[str, Any] = {"name": subset, "split": split, "revision": revision}
        self._data: Any = None
        self._start: dict[str, Any] = {}
        self._rows: Iterator[dict[str, Any]] | None = None
        self._row = 0

    def _open(self) -> Any:
        try:
            import datasets
        except ModuleNotFoundError:
            raise ConfigError(
                "streaming a data set needs the package `datasets`: pip install 'gnomon[data]'; or write "
                "--text.files a.jsonl to read local files, which need nothing"
            ) from None
        try:
            data = datasets.load_dataset(self.name, streaming=True, **self._args)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            what = f"{self.name!r} (split {self._args['split']!r})"
            raise DataError(
                f"the data set {what} cannot be streamed: {str(error)[:200]}. Without the Hub, write --text.files "
                "a.jsonl,b.parquet instead of --text.dataset: local files take the same path"
            ) from None
        if data.column_names:
            data = data.select_columns([n for n in data.column_names if n in self._names] or data.column_names)
        return data

    def seek(self, at: Mapping[str, Any] | None) -> None:
        if self._data is None:
            self._data = self._open()
            self._start = copy.deepcopy(self._data.state_dict())
        self._data.load_state_dict(copy.deepcopy(dict(at["state"]) if at else self._start))
        self._row = int(at["row"]) if at else 0
        self._rows = iter(self._data)

    def __next__(self) -> Raw:
        if self._rows is None:
            self.seek(None)
        assert self._rows is not None
        try:
            value = next(self._rows)
        except StopIteration:
            raise
        except Exception as error:  # of file systems, formats and HTTP clients of others
            what = f"{type(error).__name__}: {error}"[:300]
            raise DataError(f"the stream of {self.name} broke behind row {self._row}: {what}") from error
        self._row += 1
        return Raw(self._row, value)

    def where(self) -> dict[str, Any]:
        if self._data is None:
            self.seek(None)
        return {"row": self._row, "state": copy.deepcopy(self._data.state_dict())}

    def fingerprint(self) -> str:
        return hashlib.blake2b(repr((self.name, sorted(self._args.items()))).encode(), digest_size=16).hexdigest()

    def close(self) -> None:
        self._rows = None


def open_file(path: Path, names: Sequence[str]) -> Reader:
    """The reader of a file, by its ending. names: columns that are wanted. Raises ConfigError for other endings."""
    if not path.is_file():
        raise ConfigError(f"text file {str(path)!r} does not exist; give .jsonl, .jsonl.gz, .parquet or .arrow files")
    if path.suffix in (".jsonl", ".ndjson") or path.name.endswith((".jsonl.gz", ".ndjson.gz")):
        return Lines(path)
    if path.suffix in (".parquet", ".arrow"):
        from gnomon.data.columnar import ArrowRows, ParquetRows

        return ParquetRows(path, names) if path.suffix == ".parquet" else ArrowRows(path, names)
    raise ConfigError(
        f"text file {str(path)!r} ends in {path.suffix!r}; write .jsonl, .jsonl.gz, .parquet or .arrow, and unpack .zst"
    )
