"""The tokenizer: lossless, tags are single ids that text never reaches, digits one id each."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base.errors import ModelError, TagError
from gnomon.data import tokenizer as tokenizers
from gnomon.data.tokenizer import Tokenizer, check_atomic
from gnomon.protocol import tags

EVERY_TAG = (*tags.TAGS, *tags.STRUCTURE_TOKENS, tags.BOS, tags.EOS, tags.PAD)
LOADED: dict[str, Tokenizer] = {}


@pytest.fixture(autouse=True)
def _shared(tok: Tokenizer) -> None:
    LOADED["tok"] = tok  # hypothesis calls a test function many times; fixtures of function scope are refused there


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives(text: str) -> None:
    tok = LOADED["tok"]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not set(ids) & set(tok.control)
    assert all(0 <= i < tok.vocab_size for i in ids)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([*EVERY_TAG, "<unk>", "<s>", "▁", " ", "\n"]), st.text(max_size=6)), max_size=8)
)
def test_tag_strings_stay_text(parts: list[str]) -> None:
    """What a user types opens nothing, and still survives as it was typed."""
    tok = LOADED["tok"]
    text = "".join(parts)
    ids = tok.encode(text)
    assert not set(ids) & set(tok.control)
    assert tok.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=0x80, codec="utf-8"), min_size=1, max_size=8), st.data())
def test_a_cut_inside_a_character_shows_neither_a_substitute_nor_a_swallowed_tag(
    text: str, data: st.DataObject
) -> None:
    """Unknown characters are spelt in bytes, and a budget may end between them."""
    tok = LOADED["tok"]
    ids = tok.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    shown = tok.decode(ids[:cut])
    assert text.startswith(shown)
    assert tok.decode([*ids[:cut], tok.end_think, *ids]) == f"{shown}{tags.END_THINK}{text}"


def test_only_the_unfinished_character_is_dropped(tok: Tokenizer) -> None:
    smile = tok.encode("\U0001f642")
    assert len(smile) == 4  # bytes
    assert [tok.decode([*tok.encode("ab"), *smile[:n]]) for n in range(5)] == ["ab"] * 4 + ["ab\U0001f642"]
    assert tok.decode(tok.encode("a\ufffd")) == "a\ufffd"  # a genuine one
    assert tok.decode([*smile[:2], *tok.encode("x")]).endswith("x")  # a broken one inside stays visible
    assert "\ufffd" in tok.decode([*smile[:2], *tok.encode("x")])
    assert tok.decode([smile[1], smile[1]]) == "\ufffd\ufffd"  # never the beginning of a character


@pytest.mark.parametrize("tag", EVERY_TAG)
def test_every_tag_is_one_id_and_is_shown(tok: Tokenizer, tag: str) -> None:
    ident = {name: i for i, name in tok.control.items()}[tag]
    assert tok.decode([ident]) == tag
    assert len(tok.encode(tag)) > 1 and ident not in tok.encode(tag)
    a, b = tok.encode(" one"), tok.encode("two 2")
    assert tok.decode([*a, ident, *b]) == f" one{tag}two 2"


def test_named_ids_are_distinct(tok: Tokenizer) -> None:
    named = [tok.pad, tok.bos, tok.eos, tok.think, tok.end_think, tok.answer, tok.end_answer, tok.parent]
    named += [*tok.plan.values(), *tok.kinds.values()]
    assert len(set(named)) == len(named) == len(tok.control) == len(EVERY_TAG)
    assert set(tok.plan) == set(tags.STRATEGIES) and set(tok.kinds) == set(tags.KINDS)
    assert (tok.pad, tok.bos, tok.eos) == (0, 1, 2)  # what a saved config.json says


def test_digits_are_single(tok: Tokenizer) -> None:
    for text in ("1234567890", "12 345", " 7", "x42y", "3.14", "\n10"):
        digits = [i for i in tok.encode(text) if any(c.isdigit() for c in tok.decode([i]))]
        assert len(digits) == sum(c.isdigit() for c in text)
    pieces = [tok.decode([i]) for i in range(tok.vocab_size) if i not in tok.control]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1]


def test_save_and_load(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode("Compute 3 + 4.") == tok.encode("Compute 3 + 4.") and again.control == tok.control
    with pytest.raises(ModelError, match="no tokenizer.model in .*empty"):
        Tokenizer.load(tmp_path / "empty")


def test_stops(tok: Tokenizer) -> None:
    """Tags and lonely pieces can be matched as one id; the rest is named with its pieces."""
    check_atomic(tok, [*EVERY_TAG, "\n"])
    with pytest.raises(TagError, match=r"stop sequence '<stop>' splits into \d+ tokens \(.*'<'"):
        check_atomic(tok, [tags.END_ANSWER, "<stop>"])
    with pytest.raises(TagError, match="'<plan:guess>' splits into"):
        check_atomic(tok, ["<plan:guess>"])
    with pytest.raises(TagError, match="' a' also hides inside .* longer tokens"):
        check_atomic(tok, [" a"])
    with pytest.raises(TagError, match="empty"):
        check_atomic(tok, [""])


def test_a_model_without_our_tags_is_refused(tmp_path: Path) -> None:
    """As in a SentencePiece model from elsewhere, where a tag would split."""
    text = tmp_path / "text"
    text.write_text("one two three four five six seven\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=300, byte_fallback=True, model_type="bpe",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece=tags.PAD, bos_piece=tags.BOS, eos_piece=tags.EOS,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(TagError, match=f"tag {tags.THINK} is not one control token"):
        Tokenizer((tmp_path / "m.model").read_bytes())


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(TagError, match="vocab_size 300 leaves no room"):
        tokenizers.train(["a b c"], vocab_size=300)
