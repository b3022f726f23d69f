"""Checkpoints: what stands beside Megatron's files, and the checks before they are read."""
