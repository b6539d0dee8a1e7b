import io
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint.pickled.scan import scan
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import ModelConfig

HARMLESS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "ml_dtypes.bfloat16",
)
SHARED = Path(__file__).parents[3] / "shared"


class QuantizedWeight8bit:
    """Stands in for the class of the release's own code, under the name that its files have."""

    def __init__(self, weight, scales):
        self.weight = weight
        self.scales = scales


QuantizedWeight8bit.__module__ = "__main__"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("__main__", "QuantizedWeight8bit"):
            return QuantizedWeight8bit
        assert f"{module}.{name}" in HARMLESS
        return super().find_class(module, name)


@pytest.fixture(scope="session")
def golden():
    """The folder of a sample checkpoint that NumPy 1.26 wrote."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the golden checkpoint is not here")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def release_table():
    """The table of the release's files."""
    path = SHARED / "release" / "tensors.tsv"
    if not path.is_file():
        pytest.skip("the table of the release is not here")
    return path


@pytest.fixture(scope="session")
def dump():
    """`pickle.dumps`, protocol 4, of an array or a quantised weight, by the pickler in C or in Python."""

    def dump(array, scales=None, *, python=False):
        value = array if scales is None else QuantizedWeight8bit(array, scales)
        main = __import__("__main__")
        main.QuantizedWeight8bit = QuantizedWeight8bit  # a pickler checks that the name leads to the class
        try:
            file = io.BytesIO()
            pickler = pickle._Pickler if python else pickle.Pickler
            pickler(file, 4).dump(value)
            return file.getvalue()
        finally:
            del main.QuantizedWeight8bit

    return dump


@pytest.fixture(scope="session")
def unpickle():
    """What Python's own unpickler makes of a tensor file: the array, and the scales or None."""

    def unpickle(path):
        with open(path, "rb") as file:
            value = _Unpickler(file).load()
        if isinstance(value, np.ndarray):
            return SimpleNamespace(array=value, scales=None)
        return SimpleNamespace(array=value.weight, scales=value.scales)

    return unpickle


@pytest.fixture(scope="session")
def check_scan(unpickle):
    """Fails unless the scanner finds in a file what Python's own unpickler makes of it."""

    def check_scan(path):
        found, expected, data = scan(path), unpickle(path), path.read_bytes()
        for stored, array in ((found.array, expected.array), (found.scales, expected.scales)):
            if array is None:
                assert stored is None
                continue
            assert (stored.dtype, stored.shape) == (array.dtype, array.shape)
            assert data[stored.offset : stored.offset + stored.nbytes] == array.tobytes()

    return check_scan


@pytest.fixture(scope="session")
def small_config():
    """A model of 11 layers, so that the order of the layers' files shows, and of 30 thousand weights."""
    return ModelConfig(
        vocab_size=24,
        emb_size=16,
        key_size=2,
        num_q_heads=8,
        num_kv_heads=4,
        num_layers=11,
        widening_factor=1,
        num_experts=3,
        sequence_len=32,
    )


@pytest.fixture(scope="session")
def written(tmp_path_factory, small_config):
    """A checkpoint by our writer; tests must not change it."""
    directory = tmp_path_factory.mktemp("written") / "model"
    write_checkpoint(directory, small_config, seed=3, tokenizer=b"pieces")
    return directory


@pytest.fixture
def checkpoint_copy(tmp_path, written):
    """A copy of `written` to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture(scope="session")
def small_quantized(dump):
    """The bytes of a small quantised file."""
    weight = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
    scales = np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16)
    return dump(weight, scales)


@pytest.fixture(scope="session")
def small_array(dump):
    """The bytes of a small plain file."""
    return dump(np.arange(6, dtype=np.float32).reshape(3, 2))
