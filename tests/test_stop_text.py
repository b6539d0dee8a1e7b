from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grok1.errors import RequestError
from grok1.text.stop_sequences import StopMatcher

texts = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut_at_once(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, letter by letter: the shortest beginning of the text that ends with a stop text."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown, found = "", None
    for piece in pieces:
        certain, found = matcher.push(piece)
        shown += certain
    return shown + matcher.flush(), found


@given(st.lists(texts, max_size=6), stop_lists)
@example(["ab", "aab"], ["abaa", "ba"])
@example(["aabaaab", "aaac"], ["aabaaac"])
def test_any_split_of_a_text_is_cut_where_the_whole_text_is(pieces, stops):
    assert feed(pieces, stops) == cut_at_once("".join(pieces), stops)


@given(texts, stop_lists)
def test_no_more_is_held_back_than_could_begin_a_stop_text(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for end, letter in enumerate(text, 1):
        certain, found = matcher.push(letter)
        if found is not None:
            break
        shown += certain
        held = text[len(shown) : end]
        longest = max(
            (n for n in range(end + 1) if any(stop.startswith(text[end - n : end]) for stop in stops)), default=0
        )
        assert len(held) == longest


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "found"),
    [
        (["Yes.\n", "\nNo."], ["\n\n"], "Yes.", "\n\n"),
        (["Yes.\n", "No."], ["\n\n"], "Yes.\nNo.", None),
        (["abcd"], ["abcd", "bc"], "a", "bc"),  # complete before the one that starts earlier
        (["abcd"], ["cd", "bcd", "d"], "a", "bcd"),  # complete together: the longest
        (["ab", "ab"], ["ab", "abab"], "", "ab"),
        (["日本", "語。"], ["語。"], "日本", "語。"),
        (["no stop text"], [], "no stop text", None),
        ([], ["x"], "", None),
    ],
)
def test_text_ends_before_the_first_complete_stop_text(pieces, stops, shown, found):
    assert feed(pieces, stops) == (shown, found)


def test_nothing_is_shown_after_the_stop_text():
    matcher = StopMatcher(["END"])
    assert matcher.push("all END of") == ("all ", "END")
    assert matcher.push("more") == ("", "END")
    assert matcher.flush() == ""


def test_flush_gives_what_was_held_back_once():
    matcher = StopMatcher(["END"])
    assert matcher.push("THE EN") == ("THE ", None)
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_an_empty_stop_text_is_refused():
    with pytest.raises(RequestError, match="stop text is empty"):
        StopMatcher(["ok", ""])


def test_a_long_repetitive_text_is_matched_in_linear_time():
    # Comparing anew at each of the letters would take 10^10 steps.
    stop = "a" * 99_999 + "b"
    assert feed(["a" * 200_000, "b"], [stop]) == ("a" * 100_001, stop)
