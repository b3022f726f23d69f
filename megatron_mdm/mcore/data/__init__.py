"""Rows: datasets, and the micro-batches that ranks make of them."""
