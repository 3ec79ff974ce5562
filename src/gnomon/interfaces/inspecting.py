"""`data inspect`: records in colour, counts of a text source, its lengths, and how a tokenizer pads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gnomon.base.errors import ConfigError, DataError
from gnomon.interfaces import console

if TYPE_CHECKING:
    from rich.text import Text

    from gnomon.data.encode import Encoded
    from gnomon.data.stream import TextConfig
    from gnomon.data.survey import Survey
    from gnomon.data.tokenizer import Tokenizer

BARS: Final = 12
WIDTH: Final = 40


def coloured(tok: Tokenizer, record: Encoded, number: int) -> Text:
    """A record with its roles: trained text green, given text dim, tags bold green (trained) or cyan."""
    from rich.text import Text

    line = Text.assemble((f"{number}: ", "bold"))
    run: list[int] = []
    trained = 0

    def flush() -> None:
        if run:  # a character may take several ids: they are decoded together
            line.append(tok.decode(run), style="green" if trained else "dim")
            run.clear()

    for ident, on in zip(record.ids, record.loss, strict=True):
        if ident in tok.control:
            flush()
            line.append(tok.control[ident], style="bold green" if on else "cyan")
            continue
        if on != trained:
            flush()
        trained = on
        run.append(ident)
    flush()
    return line


def spans(tok: Tokenizer, record: Encoded) -> list[dict[str, Any]]:
    """The same as data: [{"text", "role": "trained" | "given", "tag"}]."""
    found: list[dict[str, Any]] = []
    for ident, on in zip(record.ids, record.loss, strict=True):
        role, tag = ("trained" if on else "given"), ident in tok.control
        if found and not tag and not found[-1]["tag"] and found[-1]["role"] == role:
            found[-1]["ids"].append(ident)
        else:
            found.append({"role": role, "tag": tag, "ids": [ident]})
    return [{"text": tok.decode(span["ids"]), "role": span["role"], "tag": span["tag"]} for span in found]


def padding(folder: Path | None) -> dict[str, Any]:
    """How rows are filled up for a model (row P3): side, pad id, and what was put right."""
    from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
    from gnomon.reasoner import shipped

    place = folder or shipped("nano")
    if (place / MODEL_FILE).is_file() and not (place / "tokenizer.json").is_file():
        note = "own tokenizer: training packs rows and masks what is left; in decoding every slot has its own length"
        return {"side": "none", "pad": Tokenizer.load(place).pad, "corrected": False, "notes": [note]}
    from gnomon.data.foreign import TextCodec

    codec = TextCodec.load(place)
    corrected = any(note.startswith("padding_side") for note in codec.notes)
    side = str(codec.tokenizer.padding_side)
    return {"side": side, "pad": codec.layout.pad, "corrected": corrected, "notes": list(codec.notes)}


def show_corpus(folder: Path, n: int, start: int, split: str, tokenizer: Path | None, as_json: bool) -> None:
    """Records of a packed corpus."""
    from gnomon.data.corpus import Bins
    from gnomon.data.tokenizer import Tokenizer

    bins, tok = Bins(folder, split), Tokenizer.load(tokenizer or folder)
    if not 0 <= start < len(bins):
        raise ConfigError(f"start = {start}, but {folder} holds records 0 to {len(bins) - 1}")
    records = [bins.record(i) for i in range(start, min(start + n, len(bins)))]
    if as_json:
        body = {"corpus": str(folder), "records": len(bins), "tokens": bins.tokens, "padding": padding(folder)}
        console.emit_json({**body, "shown": [spans(tok, r) for r in records]})
        return
    _legend()
    for number, record in enumerate(records, start=start):
        console.out().print(coloured(tok, record, number))
        console.out().print(f"   {len(record.ids)} tokens, {sum(record.loss)} trained")
    _padding_line(padding(folder))


def show_text(config: TextConfig, tokenizer: Path | None, rows: int, n: int, start: int, as_json: bool) -> None:
    """Counts, lengths and records of text files and data sets. Raises DataError when a file broke off."""
    from gnomon.data.survey import survey
    from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
    from gnomon.reasoner import shipped

    own = tokenizer if tokenizer is not None and (tokenizer / MODEL_FILE).is_file() else shipped("nano")
    tok = Tokenizer.load(own)
    found, pads = survey(config, tok, rows, n, start), padding(tokenizer)
    if as_json:
        console.emit_json({"sources": [_facts(s, tok) for s in found], "padding": pads})
    else:
        if tokenizer is not None and own != tokenizer:
            console.say(f"{tokenizer} is no own model: lengths and records are those of the shipped tokenizer")
        _legend()
        for source in found:
            _show(source, tok, start)
        _padding_line(pads)
    faults = [s.fault for s in found if s.fault]
    if faults:
        raise DataError("; ".join(faults))


def _facts(s: Survey, tok: Tokenizer) -> dict[str, Any]:
    counts = {"used": s.used, "escaped": s.escaped, "quarantined": s.quarantined, "reasons": dict(s.reasons)}
    lengths = {"longest": s.longest, "max_len": s.max_len, "sizes": dict(sorted(s.sizes.items(), key=_unit))}
    refused = [{"row": row, "reason": reason, "text": text} for row, reason, text in s.refused]
    size = {"records": s.records, "tokens": s.tokens}
    shown = [spans(tok, r) for r in s.shown]
    return {"name": s.name, **counts, **size, **lengths, "refused": refused, "fault": s.fault, "shown": shown}


def _unit(item: tuple[str, int]) -> int:
    return int(item[0])


def _legend() -> None:
    from rich.text import Text

    parts = [("trained ", "green"), ("given ", "dim"), ("tag, trained ", "bold green"), ("tag", "cyan")]
    console.out().print(Text.assemble(*parts))


def _show(s: Survey, tok: Tokenizer, start: int) -> None:
    from rich.text import Text

    out = console.out()
    out.print(Text(s.name, style="bold"))
    for number, record in enumerate(s.shown, start=start):
        out.print(coloured(tok, record, number))
        out.print(f"   {len(record.ids)} tokens, {sum(record.loss)} trained")
    out.print(f"{s.used:,} rows used (of them {s.escaped:,} escaped), {s.quarantined:,} quarantined")
    for reason, count in s.reasons.most_common():
        out.print(Text(f"   {count:,} × {reason}", style="red"))
    for row, _, text in s.refused:
        out.print(Text(f"   row {row}: {text[:100]}", style="dim"))
    if s.records:
        out.print(f"{s.records:,} records, {s.tokens:,} tokens, longest {s.longest:,}; row length probed: {s.max_len}")
        for line in histogram(s.sizes):
            out.print(Text(line))


def histogram(sizes: dict[str, int]) -> Sequence[str]:
    """Lengths as bars, one a line, at most 12 of equal width."""
    from gnomon.data.stream import ROUND

    last = max(map(int, sizes))
    step = -(-last // BARS)
    sums = [sum(sizes.get(str(u), 0) for u in range(low + 1, low + step + 1)) for low in range(0, last, step)]
    top = max(sums)
    return [
        f"   {i * step * ROUND + 1:>6} to {(i + 1) * step * ROUND:<6} {'█' * round(WIDTH * count / top)} {count:,}"
        for i, count in enumerate(sums)
    ]


def _padding_line(pads: dict[str, Any]) -> None:
    mended = "corrected" if pads["corrected"] else "nothing to correct"
    console.out().print(f"padding: {pads['side']} (id {pads['pad']}, {mended}); {'; '.join(pads['notes'])}")
