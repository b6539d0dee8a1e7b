"""Trains `bard`, the small model that ships with grok1, with a separate implementation of the architecture."""
