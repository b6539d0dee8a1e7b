"""What computes the operations."""

from __future__ import annotations

from typing import Literal

Backend = Literal["xla", "cpu", "gpu", "tpu"]
"""What XLA makes of plain JAX, or the kernels of the module of that name.

The kernels of `gpu` and `tpu` are Pallas programs, which processors interpret: slowly, and with the same results.
"""
