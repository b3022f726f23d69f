"""Training runs with cached results, and their statistics, for benchmarks and studies."""
