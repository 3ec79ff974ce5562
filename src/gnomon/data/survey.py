"""What is in a text source before anybody trains on it: counts with reasons, lengths, the row length they ask for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gnomon.base.errors import DataError
from gnomon.data.encode import Encoded
from gnomon.data.ingest import BadRow, Raw, excerpt
from gnomon.data.readers import Hub, Reader, open_file
from gnomon.data.rows import Form, encode_sample
from gnomon.data.stream import TextConfig, count_size, quantile, text_files
from gnomon.data.tokenizer import Tokenizer


@dataclass
class Survey:
    """One file or data set, as far as it was read. sizes: records by length, in units of 64 ids. fault: why the reading
    broke off. refused: the first bad rows (row, reason, excerpt)."""

    name: str
    used: int = 0
    escaped: int = 0
    quarantined: int = 0
    records: int = 0
    tokens: int = 0
    longest: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    shown: list[Encoded] = field(default_factory=list)
    fault: str | None = None

    @property
    def max_len(self) -> int:
        """The row length that a run would begin with, before the model's context caps it."""
        return quantile(self.sizes)


def survey(config: TextConfig, tok: Tokenizer, rows: int = 0, n: int = 5, start: int = 0) -> list[Survey]:
    """The first `rows` rows of each file and data set as they stand (0 = all), and `n` records from `start` on.

    Bad rows and broken files stop nothing: they are what it is for. Raises ConfigError for files that are not there.
    """
    form = Form(config.columns, config.on_tags, config.history_think)
    readers: list[Reader] = [open_file(path, form.names) for path in text_files(config)]
    if config.dataset:
        readers.append(Hub(config.dataset, form.names, config.split, config.subset, config.revision))
    return [_one(reader, form, tok, rows, range(start, start + n)) for reader in readers]


def _one(reader: Reader, form: Form, tok: Tokenizer, rows: int, wanted: range) -> Survey:
    out = Survey(reader.name)
    try:
        reader.seek(None)
        while not rows or out.used + out.quarantined < rows:
            _take(out, next(reader), form, tok, wanted)
    except StopIteration:
        pass
    except DataError as error:
        out.fault = str(error)
    finally:
        reader.close()
    return out


def _take(out: Survey, raw: Raw, form: Form, tok: Tokenizer, wanted: range) -> None:
    try:
        if raw.reason is not None:
            raise BadRow(raw.reason)
        samples, tags = form.samples(raw.value)
    except BadRow as error:
        out.quarantined += 1
        out.reasons[str(error)] += 1
        if len(out.refused) < len(wanted):
            out.refused.append((raw.number, str(error), excerpt(raw.source or raw.value)))
        return
    out.used += 1
    out.escaped += tags
    for sample in samples:
        record, size = encode_sample(tok, sample)
        if out.records in wanted:
            out.shown.append(record)
        out.records += 1
        out.tokens += size
        out.longest = max(out.longest, size)
        count_size(out.sizes, size)
