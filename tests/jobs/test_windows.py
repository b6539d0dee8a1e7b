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
    for window, window_first in windows(list(range(length)), first, context, stride):
        assert window == list(range(window[0], window[-1] + 1))
        assert 0 < window_first < len(window)
        assert len(window) - 1 <= context  # the last is not read
        for index in window[window_first:]:
            assert index - window[0] >= min(index, context - stride + 1)
            scored.append(index)
    assert scored == list(range(first, length))


def test_a_text_that_fits_is_one_window():
    for length in range(2, 12):
        assert windows(list(range(length)), 1, 10, 5) == [(list(range(length)), 1)]


def test_chunks_score_their_second_halves():
    rows = list(chunk_rows(list(range(100, 127)), 8, bos=None))
    chunks = [list(range(100 + i, 108 + i)) for i in (0, 8, 16)]
    assert [row.task.tokens for row in rows] == chunks
    assert [row.index for row in rows] == [0, 1, 2]
    # As llama.cpp: from the logits at n_ctx / 2 on.
    assert [row.task.requests for row in rows] == [[(chunk, 5)] for chunk in chunks]
    begun = list(chunk_rows(list(range(100, 127)), 8, bos=1))
    assert [row.task.requests for row in begun] == [[([1, *chunk[1:]], 5)] for chunk in chunks]
