"""The operations in which a model spends its time: a reference of each in plain JAX, and kernels for each platform."""
