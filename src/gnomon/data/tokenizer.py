"""The tokenizer of our own models: SentencePiece (BPE, digits split, byte fallback), lossless on any text.

Tags are control symbols: SentencePiece never produces them from text, so a tag string that a user types is
encoded as ordinary pieces and opens nothing (decisions.md §2). Tags are inserted by id, and decoding shows them.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece as spm

from gnomon.base.errors import ModelError, TagError
from gnomon.protocol import tags

MODEL_FILE = "tokenizer.model"
_CONTROL = (*tags.TAGS, *tags.STRUCTURE_TOKENS)
# A digit after a space is one piece, and a newline is one piece.
_SPACE_MARK = "▁"  # how SentencePiece writes a space inside its pieces
_SYMBOLS = (*(f"{_SPACE_MARK}{d}" for d in range(10)), "\n")


class Tokenizer:
    """Text <-> ids. `encode` and `decode` are inverse on text without control ids."""

    def __init__(self, model: bytes):
        self.model = model
        self._sp = spm.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._sp.get_piece_size()
        raw = [int(self._sp.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256)]
        self._byte = {ident: byte for byte, ident in enumerate(raw) if self._sp.is_byte(ident)}
        self._mark = [raw[byte] for byte in _SPACE_MARK.encode()]
        self.pad, self.bos, self.eos = self._id(tags.PAD), self._id(tags.BOS), self._id(tags.EOS)
        self.think, self.end_think = self._id(tags.THINK), self._id(tags.END_THINK)
        self.answer, self.end_answer = self._id(tags.ANSWER), self._id(tags.END_ANSWER)
        self.plan = {name: self._id(tag) for name, tag in tags.PLAN.items()}
        self.kinds = {kind: self._id(token) for kind, token in tags.KIND_TOKENS.items()}
        self.parent = self._id(tags.PARENT_TOKEN)
        self.control = {self._id(t): t for t in (tags.PAD, tags.BOS, tags.EOS, *_CONTROL)}

    def _id(self, piece: str) -> int:
        ident = self._sp.piece_to_id(piece)
        if ident == self._sp.unk_id() or not (self._sp.is_control(ident) or piece == tags.PAD):
            raise TagError(
                f"tag {piece} is not one control token of this tokenizer; train it with `gnomon tokenizer train`."
            )
        return int(ident)

    def encode(self, text: str) -> list[int]:
        """Ids of a text segment; never a control id."""
        first, *rest = text.split(_SPACE_MARK)
        ids = list(self._sp.encode(first))
        for part in rest:  # SentencePiece would read the mark as a space
            ids += [*self._mark, *self._sp.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control ids appear as their tags.

        A character whose bytes are cut off at the end or by a tag (a budget can do that) is left out, not shown as
        U+FFFD; bytes that are none in the middle of text are shown so.
        """
        parts: list[str] = []
        run: list[int] = []
        for ident in ids:
            if ident in self.control:
                parts.append(self._whole(run))
                parts.append(self.control[ident])
                run = []
            else:
                run.append(int(ident))
        parts.append(self._whole(run))
        return "".join(parts)

    def _whole(self, run: list[int]) -> str:
        """Text of ids without a tag, an unfinished character at the end dropped."""
        at = len(run)
        while at and run[at - 1] in self._byte:
            at -= 1
        if at == len(run):
            return str(self._sp.decode(run))
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        reader.decode(bytes(self._byte[i] for i in run[at:]))
        return str(self._sp.decode(run[: len(run) - len(reader.getstate()[0])]))

    def piece(self, ident: int) -> str:
        """The surface of one id, for inspection."""
        return str(self._sp.id_to_piece(int(ident)))

    def save(self, folder: str | Path) -> None:
        (Path(folder) / MODEL_FILE).write_bytes(self.model)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        path = Path(folder) / MODEL_FILE
        if not path.is_file():
            raise ModelError(f"no {MODEL_FILE} in {Path(folder).resolve()}; a gnomon model folder holds one.")
        return cls(path.read_bytes())


def check_atomic(tok: Tokenizer, stops: Iterable[str]) -> None:
    """Raise TagError, naming it, for a custom stop sequence that one id cannot match.

    A tag matches as its control id (`Tokenizer` itself refuses a model in which a tag is not one). Any other text must
    be one piece that no longer piece contains: the controller compares single ids.
    """
    names = {name: ident for ident, name in tok.control.items()}
    for stop in stops:
        if stop in names:
            continue
        if not stop:
            raise TagError("a stop sequence is empty; it would match everywhere. Leave it out.")
        ids = tok.encode(stop)
        hint = f"stop at a tag such as {tags.END_ANSWER} instead"
        if len(ids) != 1:
            pieces = " ".join(repr(tok.piece(i)) for i in ids)
            raise TagError(f"stop sequence {stop!r} splits into {len(ids)} tokens ({pieces}); {hint}.")
        others = {tok.decode([i]) for i in range(tok.vocab_size) if i not in tok.control}
        longer = sorted(p for p in others if stop in p and p != stop)
        if longer:
            shown = ", ".join(map(repr, longer[:3]))
            raise TagError(
                f"stop sequence {stop!r} also hides inside {len(longer)} longer tokens ({shown}) and would be missed "
                f"there; {hint}."
            )


def train(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """Train a tokenizer on text segments (tags excluded). vocab_size counts tags, 256 bytes and pieces."""
    room = 300 + len(_CONTROL)
    if vocab_size < room + 64:
        raise TagError(f"vocab_size {vocab_size} leaves no room for words; tags and bytes alone take {room}.")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=_cleaned(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=list(_CONTROL),
        user_defined_symbols=list(_SYMBOLS),
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece=tags.PAD, bos_piece=tags.BOS, eos_piece=tags.EOS, unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def _cleaned(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)
