"""What result lines and the corpus say about log-probabilities that are not finite and rows without text."""

import json
import math

import pytest

from grok1.jobs.result_json import json_line, row_score_object
from grok1.jobs.score import Corpus
from grok1.model import Score
from grok1.request import TokenLogprobs


def line(logprobs, num_bytes):
    score = Score([7] * (len(logprobs) + 1), [TokenLogprobs(value) for value in logprobs], num_bytes)
    return json_line(row_score_object(score, [7], per_token=False, top=False))


def corpus_of(*lines):
    corpus = Corpus()
    for text in lines:
        corpus.add(text)
    return corpus


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_what_is_not_finite_is_null(value):
    told = json.loads(line([-1.0, value], 5))
    assert (told["num_bytes"], told["perplexity"], told["bits_per_byte"]) == (5, None, None)
    corpus = json.loads(corpus_of(line([-1.0], 2), line([value], 5)).line())["corpus"]
    assert (corpus["num_bytes"], corpus["perplexity"], corpus["bits_per_byte"]) == (7, None, None)


def test_a_corpus_divides_the_sums_of_its_rows():
    corpus = corpus_of(line([-3.0, -1.0], 2), '{"index": 1, "error": "bad"}', line([-2.0], 10), line([-1.0], 0))
    assert corpus.bits_per_byte == pytest.approx(7 / math.log(2) / 12)


def test_rows_without_bytes():
    assert json.loads(line([-1.0], 0))["bits_per_byte"] is None
    assert corpus_of(line([-1.0], 0)).bits_per_byte is None
    assert json.loads(line([-1.0], None))["bits_per_byte"] is None
    without = corpus_of(line([-1.0], None), line([-2.0], None))
    assert (without.num_bytes, without.bits_per_byte) == (None, None)
