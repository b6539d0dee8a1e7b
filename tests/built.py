"""Requirements of tests that are not available everywhere."""

import pytest

from grok1.ops.cpu import library as cpu


def require_kernels():
    """Skip the calling test or module if the native kernels have not been built."""
    if not cpu.kernel_names():
        pytest.skip("no kernels were built: no C++ compiler was there", allow_module_level=True)
