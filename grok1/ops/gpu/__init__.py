"""GPU kernels, written in Pallas for Triton."""
