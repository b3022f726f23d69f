"""Rows: datasets, and the micro-batches that ranks load from them."""
