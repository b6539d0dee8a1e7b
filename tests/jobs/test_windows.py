"""Windows over long texts, and the chunks of a corpus."""

import pytest

from grok1.jobs.score import chunk_rows
from grok1.text.prompt import windows


@pytest.mark.parametrize("length", [2, 9, 10, 11, 12, 25, 40, 41])
@pytest.mark.parametrize("first", [1, 5, 9, 24])
@pytest.mark.parametrize("stride", [1, 3, 5, 10])
def test_every_token_is_scored_once_with_enough_before_it(length, first, stride):
    if first >= length:
        pytest.skip("nothing to score")
    context = 10
    scored = []
    for window in windows(length, first, context, stride):
        assert 0 <= window.start < window.first < window.end <= length
        assert window.end - window.start - 1 <= context  # the last is not read
        for place in range(window.first, window.end):
            assert place - window.start >= min(place, context - stride + 1)
            scored.append(place)
    assert scored == list(range(first, length))


def test_a_text_that_fits_is_one_window():
    for length in range(2, 12):
        [window] = windows(length, 1, 10, 5)
        assert (window.start, window.end, window.first) == (0, length, 1)


def test_chunks_score_their_second_halves():
    rows = list(chunk_rows(list(range(100, 127)), 8, bos=None))
    assert [row.tokens for row in rows] == [list(range(100 + i, 108 + i)) for i in (0, 8, 16)]
    assert [row.index for row in rows] == [0, 1, 2]
    assert {row.first for row in rows} == {5}  # as llama.cpp: from the logits at n_ctx / 2 on
    begun = list(chunk_rows(list(range(100, 127)), 8, bos=1))
    assert [row.tokens for row in begun] == [[1, *row.tokens[1:]] for row in rows]
