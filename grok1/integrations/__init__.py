"""Adapters for other programs; each needs an extra of its own."""
