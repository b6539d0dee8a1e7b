import importlib.resources
import sys
from pathlib import Path

import pytest

from grok1.checkpoint.writer import unpack_checkpoint
from grok1.config import TRAINED

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for bard_training


@pytest.fixture(scope="session")
def archive():
    """Path of bard's archive in the package."""
    with importlib.resources.as_file(importlib.resources.files("grok1").joinpath(TRAINED["bard"])) as path:
        yield path


@pytest.fixture(scope="session")
def bard(archive, tmp_path_factory):
    """Directory of the unpacked checkpoint of bard, which tests must not modify."""
    folder = tmp_path_factory.mktemp("bard") / "bard"
    unpack_checkpoint(archive, folder)
    return folder
