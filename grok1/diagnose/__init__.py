"""Measurements and checks of a whole installation: benchmark, smoke test, roofline."""
