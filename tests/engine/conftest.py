import dataclasses

import pytest


@pytest.fixture(scope="session")
def long_folder(make_checkpoint, small_config):
    """A context longer than two chunks; all experts are selected, so that no rounding changes which."""
    return make_checkpoint(dataclasses.replace(small_config, sequence_len=1100, num_experts=2))
