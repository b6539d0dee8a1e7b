"""The operations where a model's time goes, each with its definition in plain `jax.numpy` and its backends."""
