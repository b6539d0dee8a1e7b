"""TPU kernels, written in Pallas for Mosaic."""
