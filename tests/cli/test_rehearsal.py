"""Completing and scoring a prompt with the release's tokenizer on a tiny model in the release's format."""

from pathlib import Path

import pytest

from grok1.checkpoint.reader import Checkpoint
from grok1.text.tokenizer import Tokenizer

PROMPT = "The answer to life the universe and everything is of course"
PROMPT_IDS = [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]


@pytest.fixture(scope="module")
def release_tokenizer():
    path = Path(__file__).parents[2].parent / "shared" / "release" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("the release's tokenizer is not here")
    return path


def test_completion_and_score_agree(grok1, tmp_path, release_tokenizer):
    folder = tmp_path / "rehearsal"
    assert grok1("init", folder, "--preset", "tiny", "--tokenizer", release_tokenizer).code == 0
    assert Checkpoint.open(folder).config.vocab_size == 131072

    result = grok1("run", "-c", folder, "--greedy", "-n", "12", "--logprobs", "1", "--json", PROMPT, "--mesh", "1,8")
    (completion,) = result.lines
    assert completion["prompt_token_ids"] == PROMPT_IDS
    assert len(completion["token_ids"]) == 12
    assert completion["finish_reason"] == "max_tokens"
    assert [entry["top"][0]["token_id"] for entry in completion["logprobs"]] == completion["token_ids"]

    tokenizer = Tokenizer.read(release_tokenizer)
    assert tokenizer.decode(PROMPT_IDS + completion["token_ids"]) == PROMPT + completion["text"]

    streamed = grok1("run", "-c", folder, "--greedy", "-n", "12", PROMPT, "--mesh", "1,1")
    assert streamed.out == completion["text"] + "\n"

    whole = str(PROMPT_IDS + completion["token_ids"]).encode()
    (score,) = grok1("score", "-c", folder, "--ids", "--json", stdin=whole).lines
    generated = [entry["logprob"] for entry in completion["logprobs"]]
    assert score["logprobs"][len(PROMPT_IDS) :] == pytest.approx(generated, abs=1e-3)
