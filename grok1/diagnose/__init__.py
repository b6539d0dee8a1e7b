"""Benchmark, smoke test and roofline plot."""
