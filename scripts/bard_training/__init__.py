"""Trains `bard`, the small model that comes with grok1, with an implementation of the architecture of its own."""
