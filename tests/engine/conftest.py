import pytest
from configs import LONG


@pytest.fixture(scope="session")
def long_folder(make_checkpoint):
    """A context longer than two chunks; all experts are selected, so that no rounding changes which."""
    return make_checkpoint(LONG)
