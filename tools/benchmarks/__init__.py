"""Benchmarks of this package; tools/benchmark.py runs them."""
