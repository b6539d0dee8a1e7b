"""What tests need that is not everywhere."""

import pytest

from grok1.ops.cpu import library as cpu


def require_kernels():
    """Skips a test, or a module that calls it, where the native kernels were not built."""
    if not cpu.kernel_names():
        pytest.skip("no kernels were built: no C++ compiler was there", allow_module_level=True)
