"""Checks of a checkpoint: structure, content, hashes; and what it holds."""
