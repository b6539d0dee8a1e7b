"""Compiled prefill and decode steps, and the loops that generate and score with them."""
