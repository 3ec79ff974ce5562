"""What happens to a row that somebody else wrote: it is used, escaped or quarantined, and counted (reliability.md C3).

Escaped: its text spells a tag of ours. Our tokenizer holds tags as control symbols that no text encodes to, so the
text stays as it is and opens nothing. A base with tags as plain text has no such wall: for it, quarantine such rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gnomon.base.errors import DataError
from gnomon.base.telemetry import JsonlWriter
from gnomon.protocol.parser import has_tags
from gnomon.protocol.tags import BOS, EOS, PAD, STRUCTURE_TOKENS

MAX_ROW_BYTES: Final = 2**20
MAX_MESSAGES: Final = 128
MIN_ROWS: Final = 200  # below so many rows a share says little
MAX_NAMED: Final = 10_000
SHOWN: Final = 200
_MORE_TAGS: Final = (*STRUCTURE_TOKENS, BOS, EOS, PAD)


class BadRow(DataError):
    """One row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Raw:
    """One row as it was read. number: line or row, from 1. Either its value, or the reason why there is none.

    source: the bytes of a line, where there are any.
    """

    number: int
    value: Any = None
    reason: str | None = None
    source: bytes = b""


def spells_tag(text: str) -> bool:
    """Whether text holds the spelling of a tag or of a control token of our tokenizer."""
    return "<" in text and (has_tags(text) or any(tag in text for tag in _MORE_TAGS))


def decoded(raw: bytes) -> str:
    """Strict UTF-8 without NUL. Raises BadRow."""
    try:
        return clean(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start} of a text)") from None


def clean(text: str) -> str:
    """The text, when it can be written: no NUL, no lone surrogates. Raises BadRow."""
    if "\0" in text:
        raise BadRow("a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("a lone surrogate") from None
    return text


def excerpt(value: Any) -> str:
    """The first 200 characters of a row, printable whatever it holds."""
    if isinstance(value, bytes):
        return value[: 4 * SHOWN].decode("utf-8", "backslashreplace")[:SHOWN]
    if isinstance(value, dict):  # a text of a megabyte is not worth encoding for 200 characters
        value = {str(k)[:SHOWN]: v[:SHOWN] if isinstance(v, str) else v for k, v in list(value.items())[:8]}
    return json.dumps(value, default=lambda v: type(v).__name__)[:SHOWN]


class Quarantine:
    """Rows that were refused, one JSON object a line, every row once however often it is read.

    path None: only counted. The file is made with the first row.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self._writer: JsonlWriter | None = None
        self._named = set(_named(path)) if path is not None and path.is_file() else set()

    def add(self, file: str, row: Raw, reason: str) -> None:
        """Count a row; name it in the file the first time it is met."""
        self.reasons[re.split(r"[(:;]", reason)[0].strip()[:80]] += 1  # without what differs from row to row
        key = (file, row.number)
        if self.path is None or key in self._named or len(self._named) >= MAX_NAMED:
            return
        self._named.add(key)
        if self._writer is None:
            self._writer = JsonlWriter(self.path)
        shown = excerpt(row.source or row.value)
        self._writer.write({"file": file, "row": row.number, "reason": reason, "text": shown})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _named(path: Path) -> Iterable[tuple[str, int]]:
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            yield str(row["file"]), int(row["row"])
        except (ValueError, KeyError, TypeError):  # a torn last line
            continue


@dataclass(frozen=True)
class Tally:
    """Counts of rows read so far. used includes escaped; rows = used + quarantined."""

    used: int = 0
    escaped: int = 0
    quarantined: int = 0

    @property
    def rows(self) -> int:
        return self.used + self.quarantined

    def check(self, share: float, name: str, reasons: Counter[str]) -> None:
        """Raise DataError when more than `share` of at least 200 rows are bad."""
        if self.rows >= MIN_ROWS and self.quarantined > share * self.rows:
            worst = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(3))
            raise DataError(
                f"{name}: {self.quarantined} of {self.rows} rows are bad, more than {share:.1%} ({worst}). Mend the "
                "data, or raise --text.bad-share; the rows are named in quarantine.jsonl of the run."
            )
