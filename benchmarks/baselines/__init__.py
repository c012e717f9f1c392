"""Straightforward implementations that suites compare with."""
