import pytest
from configs import LONG


@pytest.fixture(scope="session")
def long_folder(make_checkpoint):
    """Model with a context longer than two chunks; it selects all experts, so that rounding cannot change which."""
    return make_checkpoint(LONG)
