"""The one config of `gnomon train pretrain`, and where a run goes or goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from gnomon.base import checkpoint
from gnomon.base import config as configs
from gnomon.base.config import Config
from gnomon.base.errors import CheckpointError, ConfigError, unknown
from gnomon.base.trackers import check_names
from gnomon.data.stream import TextConfig
from gnomon.model.decoder import PRESETS
from gnomon.model.decoder import preset as preset_of
from gnomon.recipes.pretrain import CorpusConfig, PretrainConfig
from gnomon.tasks.procedural import REGISTRY
from gnomon.training.optim import OptimConfig
from gnomon.training.runtime import Pace

TOKENS_PER_RECORD: Final = 56  # a little below the mean, so that a run does not see a record twice
RECORDS: Final = (2_000, 1_000_000)
# Fields that a resumed run cannot change.
FIXED: Final = ("model.", "vocab_size", "tokenizer")
CORPUS: Final = "corpus."


class ShapeConfig(Config):
    """A preset of the decoder with any field changed; None = what the preset says."""

    preset: str = "micro"
    channels: int | None = Field(default=None, ge=8)
    layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    ffn: int | None = Field(default=None, ge=1)
    context: int | None = Field(default=None, ge=64)
    streams: int | None = Field(default=None, ge=1)
    projection: Literal["exact", "sinkhorn"] | None = None

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return name

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the preset."""
        return {k: v for k, v in self.model_dump(exclude={"preset"}).items() if v is not None}

    def filled(self) -> ShapeConfig:
        """The same shape with every field written out."""
        full = preset_of(self.preset, 8, **self.changes())
        return ShapeConfig(preset=self.preset, **full.model_dump(include=set(type(self).model_fields) - {"preset"}))

    def size(self, name: str, default: int) -> int:
        """A field of the final shape."""
        return int(getattr(self, name) or PRESETS[self.preset].get(name, default))


class PretrainRunConfig(Config):
    """Everything that decides a pretraining run. One step = `rows` rows of `row_length` tokens.

    seed names the run: initial weights, order, and the stream of the corpus. save_every, eval_every: in steps.
    keep: newest checkpoints left on disk, beside every `keep_every`-th one. micro_rows: rows that pass through the
    model at once, None = all of a process; the step stays the same. ema: rate of a moving average of the weights
    (0 = none), saved in checkpoint-N/ema. device: auto, cpu or cuda. parallel: under torchrun, ddp or fsdp (FSDP2).
    tokenizer: folder of a tokenizer to use instead of the shipped one.
    track: tensorboard, wandb (offline), trackio; metrics.jsonl is always there. text: learn from text instead of, or
    mixed with, the built-in tasks; rows are then as long as text.max_len says.
    init: "nano" or the folder of an own model whose weights the run starts from (with fresh optimisers).
    """

    model: ShapeConfig = ShapeConfig()
    steps: int = Field(default=2000, ge=1)
    rows: int = Field(default=8, ge=1)
    row_length: int = Field(default=256, ge=32)
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    seed: str = Field(default="pretrain", coerce_numbers_to_str=True)
    optim: OptimConfig = OptimConfig()
    corpus: CorpusConfig = CorpusConfig()
    text: TextConfig = TextConfig()
    save_every: int = Field(default=1000, ge=1)
    eval_every: int = Field(default=100, ge=1)
    keep: int = Field(default=3, ge=2)
    keep_every: int | None = Field(default=None, ge=1)
    micro_rows: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    ema: float = Field(default=0.0, ge=0, lt=1)
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    track: tuple[str, ...] = ()
    workers: int = Field(default=2, ge=1)
    vocab_size: int = Field(default=1024, ge=512)
    tokenizer: str | None = None
    init: str | None = None

    @field_validator("track", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        names = tuple(n.strip() for n in value.split(",") if n.strip()) if isinstance(value, str) else value
        check_names(names)
        return names

    @field_validator("corpus", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        """`chain,count`, `all`, `1,2` and `count=2` are what people write on a command line."""
        if not isinstance(value, Mapping):
            return value
        found = dict(value)
        if isinstance(found.get("tasks"), str):
            names = [n.strip() for n in found["tasks"].split(",")]
            found["tasks"] = tuple(REGISTRY) if names == ["all"] else tuple(names)
        levels = found.get("levels")
        if isinstance(levels, (str, int)):
            found["levels"] = tuple(str(levels).split(","))
        for name in found.get("tasks") or ():
            if name not in REGISTRY:
                raise unknown("task", str(name), [*REGISTRY, "all"])
        if isinstance(found.get("weights"), str):
            found["weights"] = _weights(found["weights"])
        shown = found.get("tasks") or tuple(REGISTRY)
        for name in found.get("weights") or ():
            if name not in shown:
                raise unknown("task in corpus.weights", str(name), shown)
        return found

    @model_validator(mode="after")
    def _fits(self) -> PretrainRunConfig:
        context = self.model.size("context", 512)
        if self.row_length < self.corpus.max_tokens:
            raise ConfigError(
                f"row_length {self.row_length} is below corpus.max_tokens {self.corpus.max_tokens}: the longest "
                "records would not fit; raise row_length or lower corpus.max_tokens"
            )
        if context < self.corpus.max_tokens:
            raise ConfigError(f"model.context {context} is below corpus.max_tokens {self.corpus.max_tokens}; raise it")
        return self

    def pretraining(self) -> PretrainConfig:
        """The part that the training function takes."""
        names = ("steps", "rows", "row_length", "precision", "compile", "seed", "optim")
        return PretrainConfig(**{name: getattr(self, name) for name in names})

    def pace(self) -> Pace:
        """The part that the runtime takes."""
        names = ("steps", "save_every", "eval_every", "keep", "keep_every")
        return Pace(**{name: getattr(self, name) for name in names}, clip=self.optim.clip)

    def digest(self) -> str:
        """Hash of every value."""
        return hashlib.sha256(json.dumps(configs.dump(self), sort_keys=True).encode()).hexdigest()[:16]


def _weights(text: str) -> dict[str, float]:
    """`count=2,lookup=1.5` -> {"count": 2.0, "lookup": 1.5}."""
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"corpus.weights: {part!r} is no weight; write count=2,lookup=1.5") from None
    return found


def resolve(
    file: Path | None = None, overrides: Iterable[str] | Mapping[str, Any] = (), base: Mapping[str, Any] | None = None
) -> tuple[PretrainRunConfig, dict[str, str]]:
    """(config with every value decided, origin of each value). base: the values of the checkpoint to go on from.

    The corpus follows from the run unless it is given: its stream is the seed, its size what the steps will see.
    """
    config, origins = configs.resolve(PretrainRunConfig, file, overrides, base)
    corpus: dict[str, Any] = {}
    if "corpus.records" not in origins:
        wanted = math.ceil(config.steps * config.rows * config.row_length / TOKENS_PER_RECORD)
        corpus["records"] = min(max(wanted, RECORDS[0]), RECORDS[1])
    if "corpus.stream" not in origins:
        corpus["stream"] = config.seed
    full = config.corpus.model_copy(update=corpus)
    whole = config.model_copy(update={"corpus": full, "model": config.model.filled()})
    return whole, {**origins, **{f"corpus.{k}": "derived" for k in corpus}}


def resume_point(resume: str | None, folder: Path | None, latest: Path | None = None) -> tuple[Path | None, Found]:
    """(run folder or None for a new one, newest good checkpoint or an empty Found).

    resume None: a fresh run; refused in a folder that already holds checkpoints. "auto": the newest good checkpoint of
    `folder`, else of `latest`, else a fresh start. A path: that checkpoint, or the newest of that run folder.
    """
    if resume is None:
        if folder is not None and checkpoint.steps(folder / "checkpoints"):
            raise ConfigError(
                f"{folder} already holds a run (checkpoint-{checkpoint.steps(folder / 'checkpoints')[-1]}); "
                "write --resume auto to go on, or name another --run"
            )
        return folder, Found()
    if resume == "auto":
        place = folder or latest
        if place is None or not checkpoint.steps(place / "checkpoints"):
            return place, Found(begun=place)
        return place, _newest(place)
    path = Path(resume)
    home = path if (path / "checkpoints").is_dir() else path.absolute().parent.parent
    if folder is not None and checkpoint.steps(folder / "checkpoints") and folder.resolve() != home.resolve():
        raise ConfigError(f"{folder} holds a run of its own; name a new --run for what goes on from {resume}")
    if home == path:
        return folder or path, _newest(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; write auto, a run folder, or a checkpoint-<step> folder")
    checkpoint.verify_folder(path)
    _resumable(path)
    return folder or path.parent.parent, Found(path)


class Found:
    """A checkpoint to go on from and the newer ones that were skipped, with reasons; empty = start from nothing.

    begun: a run folder that was left before its first checkpoint.
    """

    def __init__(
        self, path: Path | None = None, skipped: tuple[tuple[str, str], ...] = (), begun: Path | None = None
    ) -> None:
        self.path, self.skipped, self.begun = path, skipped, begun

    def values(self) -> dict[str, Any]:
        """The config that the checkpoint, or the run that has none yet, was started with; {} for a new run."""
        if self.path is None:
            file = None if self.begun is None else self.begun / "resolved.yaml"
            return configs.read_file(file) if file is not None and file.is_file() else {}
        file = self.path / "resolved.yaml"
        if not file.is_file():
            raise CheckpointError(f"{self.path} has no resolved.yaml: it was not written by `gnomon train pretrain`")
        return configs.read_file(file)


def _resumable(folder: Path) -> None:
    from gnomon.recipes.pretraining import resumable

    resumable(folder)


def _newest(folder: Path) -> Found:
    found = checkpoint.newest(folder / "checkpoints", check=_resumable)
    return Found(found.path, found.skipped)


def settle(old: Mapping[str, Any], new: PretrainRunConfig) -> tuple[PretrainRunConfig, list[str]]:
    """(config to go on with, one line per field that differs from the checkpoint and its effect).

    Raises ConfigError for a change of the model's shape or tokenizer.
    """
    before = configs.dump(configs.validate(PretrainRunConfig, old))
    lines = []
    for key, (was, now) in configs.differences(before, configs.dump(new)).items():
        if key.startswith(FIXED):
            raise ConfigError(f"{key} is {was} in the checkpoint and cannot become {now}: start a new run for that")
        effect = "takes effect"
        if key.startswith(CORPUS):
            effect += "; records are made anew, unless --data names some"
        elif key in ("rows", "row_length", "seed"):
            effect += "; which records come next differs from an unbroken run"
        lines.append(f"{key}: {was} -> {now} ({effect})")
    return new, lines


def given(key: str, origins: Mapping[str, str]) -> bool:
    """Whether the user named this field now, in a flag or a file."""
    return origins.get(key, "preset") not in ("preset", "derived")


def data_folder(run: Path, corpus: CorpusConfig, remixed: bool) -> Path:
    """Where a run keeps the records that it makes: `data`, or beside it when a resumed run has another mixture."""
    if not remixed:
        return run / "data"
    text = json.dumps(corpus.model_dump(mode="json"), sort_keys=True)
    return run / f"data-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
