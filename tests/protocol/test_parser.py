"""Splitting and segmenting: streams equal one shot, nothing raises, truncation fails closed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base.errors import DataError
from gnomon.protocol.graph import from_text
from gnomon.protocol.layout import Layout
from gnomon.protocol.parser import Piece, Splitter, collect, has_tags, segment, split, text_splitter, token_splitter
from gnomon.protocol.tags import ANSWER, END_ANSWER, END_THINK, PLAN, TAGS, THINK

WHOLE = f"{PLAN['steps']}{THINK}S1 3 < 4 </thin k{END_THINK}{ANSWER}a <b{END_ANSWER}"
LAYOUT = Layout(
    think=(12, 1), end_think=(12, 13, 2), answer=(12, 3), end_answer=(12, 13, 4), eos=(0,), pad=0,
    plans={"steps": (7,)}, end_think_also=((18, 13),),
)  # fmt: skip


def stream(text: str, cuts: list[int], **how: object) -> tuple[list[Piece], Splitter[str]]:
    """Feed `text` in the chunks between the cuts."""
    splitter = text_splitter(**how)  # type: ignore[arg-type]
    pieces, start = [], 0
    for cut in [*sorted(cuts), len(text)]:
        pieces += splitter.feed(text[start:cut])
        start = max(start, cut)
    return pieces + splitter.close(), splitter


def test_a_completion_is_split() -> None:
    got = split(WHOLE, text_splitter())
    assert (got.think, got.answer, got.outside) == ("S1 3 < 4 </thin k", "a <b", "")
    assert not got.truncated and got.blocks == 1


def test_every_split_of_the_stream_gives_the_same() -> None:
    want = split(WHOLE, text_splitter())
    for cut in range(len(WHOLE) + 1):
        assert collect(*stream(WHOLE, [cut])) == want
    for size in range(1, 17):
        assert collect(*stream(WHOLE, list(range(0, len(WHOLE), size)))) == want


def test_no_part_of_a_tag_leaves_before_it_is_certain() -> None:
    splitter = text_splitter()
    shown = "".join(piece.data for symbol in WHOLE for piece in splitter.feed(symbol))
    assert not has_tags(shown)
    for tag in TAGS:
        fresh = text_splitter()
        assert fresh.feed(tag[:-1]) == [] and fresh.feed(tag[-1]) == []


def test_a_lone_bracket_is_held_and_flushed_at_the_end() -> None:
    splitter = text_splitter(start="answer")
    assert splitter.feed("x <") == [Piece("answer", "x ")]
    assert splitter.close() == [Piece("answer", "<")]


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_truncation_fails_closed_wherever_it_falls(cut: int) -> None:
    got = split(WHOLE[:cut], text_splitter())
    inside = WHOLE.index(THINK) + len(THINK) <= cut < WHOLE.index(END_THINK) + len(END_THINK)
    if inside:
        assert got.truncated and got.answer == ""
    assert "S1" not in got.answer


def test_a_template_that_opened_or_closed_the_block_is_respected() -> None:
    opened = split(f"hm{END_THINK}yes", text_splitter(start="think", bare=True))
    assert (opened.think, opened.answer) == ("hm", "yes")
    closed = split("yes", text_splitter(start="answer", bare=True))
    assert (closed.think, closed.answer, closed.truncated) == ("", "yes", False)
    reopened = split(f"{THINK}a{END_THINK}{ANSWER}half{THINK}hm", text_splitter())
    assert (reopened.think, reopened.answer, reopened.truncated) == ("ahm", "", True)
    never = split("hm and on", text_splitter(start="think", bare=True))
    assert never.answer == "" and never.truncated


def test_a_second_block_in_the_answer_goes_to_think_and_stray_end_tags_vanish() -> None:
    text = f"{THINK}a{END_THINK}{ANSWER}b{THINK}c{END_THINK}d{END_THINK}e{END_ANSWER}"
    got = split(text, text_splitter())
    assert (got.think, got.answer, got.blocks) == ("ac", "bde", 2)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "<", "</", "think>", "x", "\n", "é", "S1 a"]), max_size=20), st.data())
def test_streaming_equals_one_shot_for_any_text(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    how = {"start": data.draw(st.sampled_from(["outside", "think", "answer"])), "bare": data.draw(st.booleans())}
    want = split(text, text_splitter(**how))  # type: ignore[arg-type]
    assert collect(*stream(text, cuts, **how)) == want
    assert END_THINK not in want.think or want.blocks > 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 12, 13, 18, 30]), max_size=40), st.integers(1, 5))
def test_token_streams_split_like_the_whole(ids: list[int], size: int) -> None:
    want = split(ids, token_splitter(LAYOUT))
    splitter = token_splitter(LAYOUT)
    pieces = [p for i in range(0, len(ids), size) for p in splitter.feed(ids[i : i + size])] + splitter.close()
    assert collect(pieces, splitter) == want
    text = " ".join(map(str, want.answer))
    assert "12 13 4" not in text


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from([*TAGS, "x", "S1", "\n"]), max_size=12).map("".join)))
def test_nothing_raises_on_garbage(text: str) -> None:
    split(text, text_splitter())
    from_text(text)
    try:
        parts = segment(text, 3)
    except DataError:
        with pytest.raises(DataError, match="record 3: "):
            segment(text, 3)
    else:
        assert all(text.count(tag) == 1 for tag in (THINK, END_THINK, ANSWER, END_ANSWER))
        assert text[parts.think.start - len(THINK) : parts.think.start] == THINK


def test_segment_gives_spans_masks_and_kinds() -> None:
    text = f"What?{PLAN['verify']}{THINK}P1 go\nnonsense\nS2 3\nM3 ok{END_THINK}{ANSWER}3{END_ANSWER}"
    got = segment(text)
    cut = lambda name: "".join(c for c, m in zip(text, got.mask(name), strict=True) if m)  # noqa: E731
    assert (cut("prompt"), cut("answer"), got.strategy) == ("What?", "3", "verify")
    assert cut("think") == "P1 go\nnonsense\nS2 3\nM3 ok"
    assert (cut("plan"), cut("exec"), cut("eval"), cut("M")) == ("P1 go", "S2 3", "M3 ok", "M3 ok")
    with pytest.raises(DataError, match="no mask 'wrong'"):
        got.mask("wrong")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"a{THINK}b{END_THINK}c", "is missing"),
        (f"{THINK}a{END_THINK}{THINK}a{END_THINK}{ANSWER}b{END_ANSWER}", "occurs 2 times"),
        (f"{ANSWER}b{END_ANSWER}{THINK}a{END_THINK}", "order"),
        (f"{THINK}a{END_THINK}hm{ANSWER}b{END_ANSWER}", "text between the blocks: 'hm'"),
        (f"{THINK}a{END_THINK}{ANSWER}b{END_ANSWER}tail", "text behind the answer: 'tail'"),
        (f"{PLAN['steps']}x{THINK}a{END_THINK}{ANSWER}b{END_ANSWER}", "directly before"),
        (f"{PLAN['steps']}{PLAN['direct']}{THINK}a{END_THINK}{ANSWER}b{END_ANSWER}", "more than one strategy"),
        ("", "is missing"),
    ],
)
def test_segment_names_record_and_reason(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"record 17: .*{reason}"):
        segment(text, 17)
