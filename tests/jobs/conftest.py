import gzip

import pytest


@pytest.fixture
def write(tmp_path):
    """Writes a file, compressed if its name says so."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write
