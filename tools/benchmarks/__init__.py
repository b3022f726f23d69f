"""Measurements of this package, run with tools/benchmark.py."""
