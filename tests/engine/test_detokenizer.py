"""Text grows by final pieces: whole characters, and nothing that may still become a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.engine.detokenizer import Detokenizer


class _ByteDecoder:
    """Token = one byte of UTF-8."""

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token_ids).decode("utf-8", errors="replace")

    def encode(self, text):
        return list(text.encode())


def _feed(text: str, stop=(), *, step: int = 1) -> tuple[list[str], Detokenizer]:
    data = text.encode()
    detokenizer = Detokenizer(_ByteDecoder(), stop)
    pieces = []
    for start in range(0, len(data), step):
        pieces.append(detokenizer.append(data[start : start + step], is_last=start + step >= len(data)))
    return pieces, detokenizer


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])), st.integers(1, 4))
def test_pieces_add_up_to_the_text_whatever_the_token_borders(text, step):
    pieces, detokenizer = _feed(text, step=step)
    assert "".join(pieces) == text == detokenizer.text


def test_a_half_character_waits_for_its_other_bytes():
    pieces, _ = _feed("aé")
    assert pieces == ["a", "", "é"]


def test_a_character_that_never_completes_is_shown_at_the_end():
    detokenizer = Detokenizer(_ByteDecoder(), ())
    assert detokenizer.append([0xC3], is_last=True) == "\ufffd"


@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_a_stop_string_cuts_the_text_before_it_wherever_tokens_end(step):
    _, detokenizer = _feed("one two STOP three", ["STOP"], step=step)
    assert detokenizer.is_stopped
    assert detokenizer.text == "one two "


def test_the_earliest_of_several_stop_strings_wins():
    _, detokenizer = _feed("abcdef", ["ef", "cd", "zz"], step=6)
    assert detokenizer.text == "ab"


def test_a_possible_beginning_of_a_stop_string_is_held_back_and_released():
    pieces, detokenizer = _feed("aSTxSTO", ["STOP"])
    assert pieces == ["a", "", "", "STx", "", "", "STO"]
    assert not detokenizer.is_stopped


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stopping_equals_searching_the_whole_text_token_by_token(text, stops):
    pieces, detokenizer = _feed(text, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert detokenizer.text == text
    else:
        # token by token, the stop string that completes first decides
        seen = text[: min(ends)]
        assert detokenizer.text == seen[: min(seen.find(s) for s in stops if s in seen)]
    assert "".join(pieces) == detokenizer.text


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None, ())
    assert detokenizer.append([1, 2], is_last=True) == ""
