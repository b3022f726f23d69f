"""Runs of the program that are kept by what they were asked for, for benchmarks and studies."""
