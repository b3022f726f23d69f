"""Decoding, prompts and the display of samples, given a callable that computes logits."""
