"""Operations as XLA compiles them from plain JAX."""
