"""Checkpoints: the files that the package adds to Megatron's, and the checks before reading."""
