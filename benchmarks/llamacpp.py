"""llama.cpp through its Python bindings, called as its server calls it: every free sequence gets the next request.

The peer is optional and no dependency of the project: `pip install llama-cpp-python` builds it from source where there
is a C++ compiler (about five minutes on two cores).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gnomon.decoding.prefix import common_prefix

MODULE = "llama_cpp"
AS_IS = "as_is"  # the GGUF file of the wheel: products in Q4_1, embedding and output in Q8_0
FTYPES = {
    "f32": "LLAMA_FTYPE_ALL_F32",
    "f16": "LLAMA_FTYPE_MOSTLY_F16",
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
}
FULL = "f32"
SMALL = (AS_IS, "q8_0", "f16", "bf16")


class Stepper(Protocol):
    """What `continuous` drives: `slots` sequences and one more, which each hold the keys of their ids."""

    slots: int

    def step(self, rows: Sequence[Row]) -> list[int]: ...

    def share(self, source: int, sequence: int) -> None: ...

    def drop(self, sequence: int) -> None: ...


@dataclass
class Row:
    """A request in its sequence: `ids` go in next, from position `at` on; `left` tokens are still to be made."""

    sequence: int
    at: int
    ids: Sequence[int]
    left: int


def available(gguf: Path | None) -> tuple[Path | None, str]:
    """The file where llama.cpp can be measured on it, else None and why it cannot."""
    if importlib.util.find_spec(MODULE) is None:
        return None, "llama_cpp is not installed; pip install llama-cpp-python builds it"
    return gguf, "" if gguf else "the wheel that carries the GGUF file is not installed"


def library() -> Any:
    """The bindings, with nothing but errors of llama.cpp on stderr."""
    lib = importlib.import_module(MODULE)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return lib


def copy(gguf: Path, folder: Path, form: str) -> Path:
    """The file in another format, written to `folder` by llama.cpp in a second or two; `AS_IS` is the file itself."""
    if form == AS_IS:
        return gguf
    lib = library()
    asked = lib.llama_model_quantize_default_params()
    asked.allow_requantize = asked.pure = True
    asked.ftype = getattr(lib, FTYPES[form])
    path = folder / f"{form}.gguf"
    code = lib.llama_model_quantize(str(gguf).encode(), str(path).encode(), ctypes.byref(asked))
    assert code == 0, f"llama.cpp cannot write {gguf.name} as {form}"
    return path


class LlamaCpp:
    """One GGUF file, greedy, at most `slots` sequences of `cells` positions each on average, `threads` threads.

    As it was fastest at both batches of `decode.py`: flash attention, one buffer for the keys of all sequences. Keys
    and values are in 16 bits, its default.
    """

    def __init__(self, gguf: Path, slots: int, cells: int, threads: int) -> None:
        self.slots = slots
        self._lib = library()
        self._model = self._lib.llama_model_load_from_file(str(gguf).encode(), self._lib.llama_model_default_params())
        assert self._model, f"llama.cpp cannot load {gguf}"
        asked = self._lib.llama_context_default_params()
        asked.n_ctx = asked.n_batch = slots * cells
        asked.n_seq_max = slots + 1
        asked.n_threads = asked.n_threads_batch = threads
        asked.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        asked.kv_unified = True
        self._context = self._lib.llama_init_from_model(self._model, asked)
        assert self._context, "llama.cpp cannot make a context"
        self._memory = self._lib.llama_get_memory(self._context)
        self._vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._batch = self._lib.llama_batch_init(slots * cells, 0, 1)

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def step(self, rows: Sequence[Row]) -> list[int]:
        """The greedy next id of every row, all of them in one call of `llama_decode`; logits of last ids only."""
        batch, n = self._batch, 0
        for row in rows:
            for i, token in enumerate(row.ids):
                batch.token[n], batch.pos[n], batch.logits[n] = token, row.at + i, i == len(row.ids) - 1
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row.sequence
                n += 1
        batch.n_tokens = n
        code = self._lib.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode returned {code}"
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(rows), self._vocab))
        return [int(i) for i in logits.argmax(1)]

    def share(self, source: int, sequence: int) -> None:
        """A sequence begins with the keys of `source`; none are copied."""
        self._lib.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)

    def drop(self, sequence: int) -> None:
        """Forget a sequence's keys."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)


def continuous(
    model: Stepper, prompts: Sequence[Sequence[int]], budgets: Sequence[int]
) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of every request, and for those with a budget the clock (perf_counter) at the first, in any order.

    The longest budgets go first and requests join beside rows that decode, so that sequences idle only at the end. What
    all prompts begin with is computed once, in the sequence that is left over, and shared (our engine does so too).
    """
    waiting = sorted((i for i, budget in enumerate(budgets) if budget), key=lambda i: budgets[i])
    free = list(range(model.slots))
    made: list[list[int]] = [[] for _ in budgets]
    firsts: list[float] = []
    running: dict[int, Row] = {}
    common = common_prefix([tuple(prompts[i]) for i in waiting], least=1)
    if common:
        model.step([Row(model.slots, 0, prompts[waiting[0]][:common], 0)])
    while waiting or running:
        while waiting and free:
            request = waiting.pop()
            row = running[request] = Row(free.pop(), common, prompts[request][common:], budgets[request])
            if common:
                model.share(model.slots, row.sequence)
        found = model.step(list(running.values()))
        for (request, row), token in zip(list(running.items()), found, strict=True):
            if not made[request]:
                firsts.append(time.perf_counter())
            made[request].append(token)
            row.at, row.ids, row.left = row.at + len(row.ids), (token,), row.left - 1
            if row.left == 0:
                model.drop(row.sequence)
                free.append(row.sequence)
                del running[request]
    if common:
        model.drop(model.slots)
    return made, firsts


@contextmanager
def opened(
    gguf: Path | None, prompts: Sequence[Sequence[int]], budgets: Sequence[int], slots: int, threads: int
) -> Iterator[tuple[dict[str, str], dict[str, LlamaCpp], dict[str, float]]]:
    """The format to set against each of our backbones, models by format, tokens per second by format (one run each).

    Against float32: f32, the same numbers. Against int8: the fastest that keeps the file's weights to a rounding. Other
    4-bit formats, which would round them to 4 bits a second time, are not among them. All empty without a file.
    """
    if gguf is None:
        yield {}, {}, {}
        return
    cells = max(map(len, prompts)) + max(budgets)
    models, rates = {}, {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for form in (FULL, *SMALL):
            models[form] = LlamaCpp(copy(gguf, Path(folder), form), slots, cells, threads)
            stack.callback(models[form].close)
            continuous(models[form], prompts[:1], (1,))
            start = time.perf_counter()
            continuous(models[form], prompts, budgets)
            rates[form] = sum(budgets) / (time.perf_counter() - start)
            print(f"  llama.cpp {form}: {rates[form]:.0f} tok/s", file=sys.stderr, flush=True)
        yield {"float32": FULL, "int8": max(SMALL, key=lambda form: rates[form])}, models, rates
