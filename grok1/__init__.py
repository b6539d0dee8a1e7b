"""grok1: run the released Grok-1 checkpoint, on any JAX mesh."""

__version__ = "0.1.0"
