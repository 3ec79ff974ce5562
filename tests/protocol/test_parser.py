"""Splitting and segmenting: streams equal one shot, nothing raises, truncation fails closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
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


# -- streams of text, of ids and of bytes ---------------------------------------------------------------------------
IDS = (7, 12, 1, 30, 12, 13, 31, 12, 13, 2, 12, 3, 30, 12, 12, 13, 4)  # plan, think, answer; begun tags inside both


def chunks(symbols: str | tuple[int, ...], size: int, make: Callable[[], Splitter[Any]]) -> list[Piece]:
    """The pieces of a stream in chunks of `size`, the flushed end included."""
    splitter = make()
    pieces = [piece for at in range(0, len(symbols), size) for piece in splitter.feed(symbols[at : at + size])]
    return pieces + splitter.close()


def joined(pieces: list[Piece]) -> list[tuple[str, tuple[Any, ...]]]:
    """Pieces with neighbours of one place joined: what a reader of the stream has at the end."""
    out: list[tuple[str, tuple[Any, ...]]] = []
    for place, data in pieces:
        if out and out[-1][0] == place:
            out[-1] = (place, (*out[-1][1], *data))
        else:
            out.append((place, tuple(data)))
    return out


@pytest.mark.parametrize("size", range(1, 17))
def test_text_in_chunks_of_any_size_cut_anywhere_reads_like_the_whole(size: int) -> None:
    for start, bare in (("outside", False), ("think", True), ("answer", True)):
        make = lambda start=start, bare=bare: text_splitter(start, bare)  # noqa: E731
        for end in range(len(WHOLE) + 1):
            assert joined(chunks(WHOLE[:end], size, make)) == joined(chunks(WHOLE[:end], len(WHOLE), make))


@pytest.mark.parametrize("size", range(1, 17))
def test_ids_in_chunks_of_any_size_cut_anywhere_read_like_the_whole(size: int) -> None:
    make = lambda: token_splitter(LAYOUT)  # noqa: E731
    for end in range(len(IDS) + 1):
        assert joined(chunks(IDS[:end], size, make)) == joined(chunks(IDS[:end], len(IDS), make))
    assert joined(chunks(IDS, size, make)) == [("think", (30, 12, 13, 31)), ("answer", (30, 12))]


@pytest.mark.parametrize("tag", TAGS)
def test_every_split_of_every_tag_is_held_and_a_tag_cut_at_the_end_is_flushed_as_text(tag: str) -> None:
    meaning = {"outside": TAGS, "think": (END_THINK,), "answer": (THINK, END_THINK, ANSWER, END_ANSWER)}
    for place, tags in meaning.items():
        for cut in range(1, len(tag)):
            begun = text_splitter(place)  # type: ignore[arg-type]
            early = begun.feed("x" + tag[:cut])
            if any(other.startswith(tag[:cut]) for other in tags):
                assert joined(early) == [(place, ("x",))], "nothing of a begun tag leaves"
            assert joined(early + begun.close()) == [(place, tuple("x" + tag[:cut]))], "and nothing of it is lost"
            whole, parted = text_splitter(place), text_splitter(place)  # type: ignore[arg-type]
            late = [*parted.feed("x" + tag[:cut]), *parted.feed(tag[cut:] + "y"), *parted.close()]
            assert joined(late) == joined([*whole.feed(f"x{tag}y"), *whole.close()])
            assert (parted.place, parted.blocks, parted.truncated) == (whole.place, whole.blocks, whole.truncated)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=4, max_size=4, unique=True),
    st.lists(st.integers(0, 3), max_size=50),
    st.integers(1, 16),
)
def test_tags_of_any_ids_stream_like_the_whole(tags: list[tuple[int, ...]], ids: list[int], size: int) -> None:
    end = tags[1]
    assume(not any(tags[3][i : i + len(end)] == end for i in range(len(tags[3]))))  # refused: it could never be closed
    layout = Layout(tags[0], end, tags[2], tags[3], {"steps": ()}, (9,), 8)
    make = lambda: token_splitter(layout)  # noqa: E731
    assert joined(chunks(tuple(ids), size, make)) == joined(chunks(tuple(ids), max(1, len(ids)), make))


def test_a_truncated_stream_never_shows_an_answer_wherever_it_is_cut() -> None:
    first, last = WHOLE.index(THINK) + len(THINK), WHOLE.index(ANSWER) + len(ANSWER)
    for size in range(1, 17):
        for end in range(first, last):
            pieces = chunks(WHOLE[:end], size, text_splitter)
            assert not [p for p in pieces if p.place == "answer"]
            got = collect(pieces, stream(WHOLE[:end], [])[1])
            assert got.answer == "" and got.truncated is (end < WHOLE.index(END_THINK) + len(END_THINK))
