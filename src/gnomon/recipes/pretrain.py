"""Pretrain our own LM on the built-in mixture: records on disk, packed rows, Muon + AdamW (issue row R1)."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gnomon.base import seeds
from gnomon.base.errors import DataError
from gnomon.data import tokenizer as tokenizers
from gnomon.data.corpus import Batch, Bins, BinSource, StepData, collate, write_bin
from gnomon.data.encode import Encoded, encode_record
from gnomon.data.tokenizer import Tokenizer
from gnomon.model.decoder import Decoder
from gnomon.tasks.demonstrations import with_demonstrations
from gnomon.tasks.mixture import Mixture
from gnomon.tasks.procedural import REGISTRY, draw
from gnomon.tasks.rules import with_examples
from gnomon.training import optim
from gnomon.training.loop import Loss, fit
from gnomon.training.optim import OptimConfig
from gnomon.training.parallel import Parallel
from gnomon.training.token_loss import token_loss

CHUNK = 2_000


class CorpusConfig(BaseModel):
    """What a corpus shows. Shares are of all records; `cut` of the records with thinking (decisions.md §1).

    weights: task -> relative frequency; tasks that are not named weigh 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    records: int = Field(default=100_000, ge=1)
    stream: str = "pretrain"
    split: str = "train"
    tasks: tuple[str, ...] = tuple(REGISTRY)
    weights: dict[str, float] = {}
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    cut: float = Field(default=0.2, ge=0, le=1)
    demonstrations: float = Field(default=0.12, ge=0, le=1)
    max_tokens: int = 256
    all_levels_at: float = 0.35


def record(tok: Tokenizer, mixture: Mixture, config: CorpusConfig, index: int) -> Encoded:
    """Record `index` of the corpus: a pure function of its arguments."""
    item = mixture.item(index, min(1.0, index / config.records))
    problem = item.problem
    rng = seeds.rng("corpus", config.stream, config.split, index)
    cut = rng.random() if item.gold.nodes and rng.random() < config.cut else None
    shown = rng.randint(1, 3) if rng.random() < config.demonstrations else 0
    if problem.task == "rules":
        problem = with_examples(problem, 3 if problem.level <= 2 else rng.choice((2, 3, 3)))
    elif shown:
        level = rng.randint(1, problem.level)
        others = [draw(problem.task, level, config.split, f"{config.stream}/examples/{k}", index) for k in range(shown)]
        problem = with_demonstrations(problem, others)
    encoded = encode_record(tok, problem.prompt, item.strategy, item.gold.nodes, item.gold.answer, cut)
    if len(encoded.ids) > config.max_tokens:
        encoded = encode_record(tok, item.problem.prompt, item.strategy, item.gold.nodes, item.gold.answer, cut)
    return encoded


def mixture_of(config: CorpusConfig) -> Mixture:
    return Mixture(
        tasks={**dict.fromkeys(config.tasks, 1.0), **config.weights},
        levels=config.levels,
        stream=config.stream,
        split=config.split,
        all_levels_at=config.all_levels_at,
    )


def train_tokenizer(config: CorpusConfig, vocab_size: int = 1024, samples: int = 20_000) -> Tokenizer:
    """A tokenizer from the text segments of the corpus."""
    mixture = mixture_of(config)

    def texts() -> Iterator[str]:
        for index in range(samples):
            item = mixture.item(index)
            segments = (item.problem.prompt, item.gold.answer, *(n.text for n in item.gold.nodes))
            yield from (f" {text}" for text in segments if text)

    return tokenizers.train(texts(), vocab_size)


def _chunk(model: bytes, config: CorpusConfig, start: int, end: int) -> list[Encoded]:
    tok, mixture = Tokenizer(model), mixture_of(config)
    return [record(tok, mixture, config, i) for i in range(start, end)]


def prepare(
    folder: Path,
    tok: Tokenizer,
    config: CorpusConfig,
    workers: int = 2,
    progress: Callable[[int], object] | None = None,
    poll: Callable[[], object] = lambda: None,
) -> int:
    """Write the corpus to `folder` as packed bins; records longer than `max_tokens` are dropped. Returns the count.

    workers: processes; with one, or for a corpus of a single chunk, everything happens in this process.
    progress(n): records done so far. poll(): called several times a second; what it raises ends the work.
    """
    spans = [(s, min(s + CHUNK, config.records)) for s in range(0, config.records, CHUNK)]
    several = workers > 1 and len(spans) > 1
    made = _in_processes(tok, config, spans, workers, poll) if several else _here(tok, config, spans, poll)

    def records() -> Iterator[Encoded]:
        for chunk, (_, end) in zip(made, spans, strict=True):
            yield from (r for r in chunk if len(r.ids) <= config.max_tokens)
            if progress:
                progress(end)

    return write_bin(folder, config.split, records(), {"config": config.model_dump(mode="json")})


def _here(
    tok: Tokenizer, config: CorpusConfig, spans: list[tuple[int, int]], poll: Callable[[], object]
) -> Iterator[list[Encoded]]:
    for start, end in spans:
        chunk: list[Encoded] = []
        for first in range(start, end, CHUNK // 10):
            poll()
            chunk += _chunk(tok.model, config, first, min(first + CHUNK // 10, end))
        yield chunk


def _in_processes(
    tok: Tokenizer, config: CorpusConfig, spans: list[tuple[int, int]], workers: int, poll: Callable[[], object]
) -> Iterator[list[Encoded]]:
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    # Ctrl-C reaches the whole process group: the workers leave it to us, who then drop what has not begun.
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        for job in [pool.submit(_chunk, tok.model, config, a, b) for a, b in spans]:
            while not wait((job,), timeout=0.2).done:
                poll()
            yield job.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # a chunk takes seconds, and nobody wants it any more
        raise
    pool.shutdown()


class PretrainConfig(BaseModel):
    """A pretraining run over packed bins. One step = `rows` rows of `row_length` tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=2000, ge=1)
    rows: int = Field(default=8, ge=1)
    row_length: int = Field(default=256, ge=32)
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    seed: str = "pretrain"
    optim: OptimConfig = OptimConfig()


class Objective(nn.Module):
    """Summed cross-entropy of the trained targets of packed rows, as one module, so that it can be sharded.

    precision: bf16 = matrix products in bfloat16 under autocast, weights and optimiser in float32. compile: the decoder
    goes through torch.compile. shaped: nothing depends on values, so that memory can be counted on fake tensors.
    """

    def __init__(
        self, decoder: Decoder, precision: Literal["bf16", "fp32"], compile: bool = False, shaped: bool = False
    ) -> None:
        super().__init__()
        self.decoder, self.low, self.shaped = decoder, precision == "bf16", shaped
        self._compiled = [torch.compile(decoder)] if compile else [decoder]  # in a list: its weights have one name

    def forward(self, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """ids, positions, targets int64 [R, T] as in `corpus.Batch` -> scalar."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.low):
            if self.shaped:
                length = ids.shape[1]
                mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
                logits = self.decoder(ids, positions, mask.expand(len(ids), 1, -1, -1)).logits
                return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            hidden = self._compiled[0](ids, positions, "records", logits="none").hidden
            return token_loss(hidden, self.decoder.unembed.weight, targets)[0]


def step_losses(
    data: StepData,
    parallel: Parallel,
    micro_rows: int | None = None,
    waited: float = 0.0,
    batch: Batch | None = None,
) -> Iterator[Loss]:
    """Micro-batches of this process's rows of a step; their losses sum to the mean over the whole step's targets,
    however many processes and micro-batches there are. waited: seconds that the data took to come. batch: the rows of
    this process, collated already.

    Raises DataError for a step in which nothing is trained.
    """
    team, total = parallel.team, data.targets
    if not total:
        raise DataError("a step has no trained target: every record is shorter than two ids or wholly masked")
    rows = team.share(data.rows)
    size = micro_rows or len(rows)
    for first in range(0, len(rows), size):
        began = time.monotonic()
        part = batch if batch and size >= len(rows) else collate(rows[first : first + size], data.length)
        inputs = [x.to(team.device, non_blocking=True) for x in (part.ids, part.positions, part.targets)]
        waited += time.monotonic() - began
        with parallel.micro(last=first + size >= len(rows)):
            yield parallel.network(*inputs) / total, {"tokens": float(part.tokens), "data/wait": waited}
        waited = 0.0


def pretrain(
    model: Decoder,
    bins: Bins,
    config: PretrainConfig,
    *,
    optimizers: list[torch.optim.Optimizer] | None = None,
    start: int = 0,
    on_step: Callable[[int, dict[str, Any]], bool | None] | None = None,
) -> dict[str, Any]:
    """Train `model` on `bins` from step `start`, in this process, without a run folder (`pretrain_run.run` has one).

    The rows of a step depend on the step number alone.
    """
    source = BinSource(bins, config.rows, config.row_length, config.seed, model.config.vocab_size)
    optimizers = optimizers or optim.build(model, config.optim)
    parallel = Parallel(Objective(model, config.precision, config.compile))
    return fit(
        lambda step: step_losses(source.step(step), parallel),
        optimizers,
        config.steps,
        schedule=lambda f: optim.schedule(config.optim, f),
        clip=config.optim.clip,
        start=start,
        on_step=on_step,
    )
