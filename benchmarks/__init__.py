"""Measurements of deqlib and viar: `python -m benchmarks SUITE`."""
