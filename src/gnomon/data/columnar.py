"""Parquet and Arrow files as rows, in small batches under a budget of bytes. pyarrow is imported when one is opened.

A Parquet file of 100 kB can hold a gigabyte of text (reliability.md B4). So columns stay dictionary-encoded, as they
are on disk, and a text becomes a Python object only when its row still has room.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gnomon.base.errors import ConfigError, DataError, GnomonError
from gnomon.data.ingest import MAX_MESSAGES, MAX_ROW_BYTES, BadRow, Raw, decoded
from gnomon.data.readers import MAX_RATIO, RATIO_FREE, Watched, print_of

BATCH: Final = 64
MAX_BATCH_BYTES: Final = 256 * 2**20
_MAGIC: Final = b"ARROW1\0\0"
_RECORD_BATCH: Final = 3  # of the union MessageHeader in Arrow's Message.fbs
_END: Final = b"\xff\xff\xff\xff\0\0\0\0"


def arrow() -> Any:
    """pyarrow. Raises ConfigError with what to install."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ConfigError(
            "Parquet and Arrow files need pyarrow: pip install 'gnomon[data]'; JSONL files need nothing"
        ) from None
    return pyarrow


def _usable(pa: Any, kind: Any, inner: bool = False) -> bool:
    """Texts, numbers, and lists of flat objects of them (`messages`)."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        return not inner and _usable(pa, kind.value_type, True)
    if types.is_struct(kind):
        return inner and all(_usable(pa, f.type, True) and not types.is_struct(f.type) for f in kind)
    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = types.is_string(kind) or types.is_large_string(kind)
    return texts or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)


def _columns(pa: Any, schema: Any, names: Sequence[str], path: Path) -> list[str]:
    """The wanted columns that are there. Raises DataError when none is, or one cannot be text."""
    found = [name for name in names if name in schema.names]
    if not found:
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}, none of the wanted {', '.join(names)}; say which is "
            "which, such as --text.columns prompt=question,completion=answer"
        )
    for name in found:
        if not _usable(pa, schema.field(name).type):
            kind = schema.field(name).type
            raise DataError(f"{path}: column {name!r} is a {kind}; a text or a list of messages is read")
    return found


def _plain(pa: Any, value: Any, room: list[int]) -> Any:
    """A scalar as Python data; room[0]: bytes that the row still may take. Raises BadRow."""
    if not value.is_valid:
        return None
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    if isinstance(value, (pa.StringScalar, pa.LargeStringScalar, pa.BinaryScalar, pa.LargeBinaryScalar)):
        raw = value.as_buffer()
        room[0] -= raw.size
        if room[0] < 0:
            raise BadRow(f"longer than {MAX_ROW_BYTES} bytes")
        return decoded(raw.to_pybytes())
    if isinstance(value, pa.ListScalar):
        if len(value) > MAX_MESSAGES:
            raise BadRow(f"more than {MAX_MESSAGES} messages")
        return [_plain(pa, value[i], room) for i in range(len(value))]
    if isinstance(value, pa.StructScalar):
        return {k: found for k, v in value.items() if (found := _plain(pa, v, room)) is not None}
    return value.as_py()


def _raw(pa: Any, batch: Any, names: Sequence[str], index: int, number: int) -> Raw:
    room = [MAX_ROW_BYTES]
    try:
        return Raw(number, {n: _plain(pa, batch.column(n)[index], room) for n in names})
    except BadRow as error:
        return Raw(number, reason=str(error))


class _Rows:
    """What both formats share: rows come from batches, a place is a batch and the rows taken from it."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.name, self._wanted = path, str(path), names
        self._pa = arrow()
        self._file: Watched | None = None
        self._rows: Iterator[Raw] | None = None
        self._row = 0  # rows behind us
        self._at: dict[str, Any] = {}

    def seek(self, at: Mapping[str, Any] | None) -> None:
        self.close()
        self._at = dict(at or {})
        self._row = int(self._at.get("row", 0))
        self._file = Watched(self.path)
        self._rows = self._read()

    def _read(self) -> Iterator[Raw]:
        raise AssertionError  # pragma: no cover - both formats have their own

    def __next__(self) -> Raw:
        if self._rows is None:
            self.seek(None)
        assert self._rows is not None and self._file is not None
        try:
            raw = next(self._rows)
        except GnomonError:
            raise
        except (OSError, self._pa.ArrowException, ValueError, LookupError, MemoryError, struct.error) as error:
            self._file.check(f"row {self._row + 1}")
            raise DataError(f"{self.path} is damaged at row {self._row + 1}: {str(error)[:200]}") from None
        self._row += 1
        return raw

    def fingerprint(self) -> str:
        return print_of(self.path)

    def close(self) -> None:
        self._rows = None
        if self._file is not None:
            self._file.close()
            self._file = None


class ParquetRows(_Rows):
    """A Parquet file. A place is a row number."""

    def _read(self) -> Iterator[Raw]:
        import pyarrow.parquet as pq

        pa, file = self._pa, self._file
        assert file is not None
        table = pq.ParquetFile(file.file, pre_buffer=False, buffer_size=2**16)
        names = _columns(pa, table.schema_arrow, self._wanted, self.path)
        self._check_sizes(table)
        paths = [table.schema.column(i).path for i in range(len(table.schema))]
        texts = [p for i, p in enumerate(paths) if table.schema.column(i).physical_type == "BYTE_ARRAY"]
        table = pq.ParquetFile(
            file.file, metadata=table.metadata, pre_buffer=False, buffer_size=2**16, read_dictionary=texts
        )
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            skip = max(0, min(rows, self._row - first))
            first += rows
            if skip == rows:
                continue
            for batch in table.iter_batches(BATCH, row_groups=[group], columns=names, use_threads=False):
                file.check(f"row {self._row + 1}")
                for index in range(min(skip, batch.num_rows), batch.num_rows):
                    yield _raw(pa, batch, names, index, self._row + 1)
                skip = max(0, skip - batch.num_rows)

    def _check_sizes(self, table: Any) -> None:
        """Pages are unpacked whole: refuse a file that unpacks to more than 100 times its size.

        By row groups: pyarrow ends the process on a damaged description of a column.
        """
        assert self._file is not None
        sizes = [table.metadata.row_group(g).total_byte_size for g in range(table.num_row_groups)]
        if min(sizes, default=0) < 0 or sum(sizes) > max(RATIO_FREE, MAX_RATIO * self._file.size):
            raise DataError(
                f"{self.path} unpacks from {self._file.size} to {sum(sizes)} bytes, above {MAX_RATIO} times its size; "
                "write it with less compression when that is meant"
            )

    def where(self) -> dict[str, Any]:
        return {"row": self._row}


class ArrowRows(_Rows):
    """An Arrow IPC file or stream, as `datasets` saves it. A place is the byte of a message and rows taken from it."""

    def _read(self) -> Iterator[Raw]:
        pa, file = self._pa, self._file
        assert file is not None
        handle = file.file
        handle.seek(len(_MAGIC) if handle.read(len(_MAGIC)) == _MAGIC else 0)
        message = self._message()
        if message is None:
            raise DataError(f"{self.path} is empty: it holds no Arrow schema")
        schema = pa.ipc.read_schema(message[0])
        names = _columns(pa, schema, self._wanted, self.path)
        raw_schema = pa.schema([pa.field(f.name, _as_binary(pa, f.type)) for f in schema])
        if self._at:
            handle.seek(int(self._at["byte"]))
        skip = int(self._at.get("skip", 0))
        while True:
            self._at = {"byte": handle.tell()}
            first = self._row - skip
            message = self._message()
            if message is None:
                return
            batch = pa.ipc.read_record_batch(message[0], raw_schema)
            batch.validate(full=True)  # offsets of a damaged batch would point anywhere
            file.check(f"row {self._row + 1}")
            for index in range(skip, batch.num_rows):
                self._at["skip"] = index + 1
                yield _raw(pa, batch, names, index, first + index + 1)
            skip = 0

    def _message(self) -> tuple[Any, int] | None:
        """The next message, None at the end. Its sizes are checked before anything is allocated for them."""
        file = self._file
        assert file is not None
        start = file.file.tell()
        head = file.file.read(8)
        if head == _END:
            return None
        mark, size = struct.unpack("<Ii", head) if len(head) == 8 else (0, 0)
        if mark != 0xFFFFFFFF or not 0 < size <= 2**24 or start + size > file.size:
            file.check(f"byte {start}")
            raise DataError(f"{self.path} is no Arrow file, or cut, or damaged, at byte {start}")
        meta = file.file.read(size)
        kind, body, header = _header(meta)
        if body > MAX_BATCH_BYTES or start + 8 + size + body > file.size:
            file.check(f"byte {start}")
            raise DataError(
                f"{self.path}, byte {start}: a batch of {body} bytes; at most {MAX_BATCH_BYTES} are read at once, and "
                f"the file ends at {file.size}; write it in smaller batches"
            )
        data = file.file.read(body)
        if len(data) < body:
            file.check(f"byte {start}")
        if kind == _RECORD_BATCH and _unpacked(meta, header, data) > max(RATIO_FREE, MAX_RATIO * body):
            raise DataError(f"{self.path}, byte {start}: a batch unpacks to more than {MAX_RATIO} times its size")
        if kind not in (1, _RECORD_BATCH):
            raise DataError(f"{self.path}, byte {start}: dictionary columns are not read; write plain texts")
        return self._pa.ipc.read_message(self._pa.py_buffer(head + meta + data)), start

    def where(self) -> dict[str, Any]:
        return {**self._at, "row": self._row} if self._row else {}


def _as_binary(pa: Any, kind: Any) -> Any:
    """The type with texts as bytes: their UTF-8 is then judged row by row."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_binary(pa, kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(_as_binary(pa, kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _as_binary(pa, f.type)) for f in kind])
    return kind


# Message := {version, header_type: u8, header, bodyLength: i64}; RecordBatch := {length, nodes, buffers, compression}
# (apache/arrow format/Message.fbs). A table begins with the distance to its vtable, which holds 16-bit field offsets.
def _field(data: bytes, table: int, number: int) -> int:
    """Byte of a field of a flatbuffers table, 0 when it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = int(struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0])
    return table + offset if offset else 0


def _header(meta: bytes) -> tuple[int, int, int]:
    """(kind of message, bytes of its body, where its header table is)."""
    root = int(struct.unpack_from("<I", meta)[0])
    kind, header, body = _field(meta, root, 1), _field(meta, root, 2), _field(meta, root, 3)
    size = struct.unpack_from("<q", meta, body)[0] if body else 0
    if not kind or not header or size < 0:
        raise struct.error("not an Arrow message")
    return meta[kind], int(size), header + int(struct.unpack_from("<I", meta, header)[0])


def _unpacked(meta: bytes, table: int, body: bytes) -> int:
    """Bytes that the buffers of a record batch take unpacked."""
    if not _field(meta, table, 3):
        return len(body)
    at = _field(meta, table, 2)
    start = at + int(struct.unpack_from("<I", meta, at)[0])
    total = 0
    for number in range(int(struct.unpack_from("<I", meta, start)[0])):
        offset, size = struct.unpack_from("<qq", meta, start + 4 + 16 * number)
        if size > 0:
            total += max(size, struct.unpack_from("<q", body, offset)[0])
    return total
