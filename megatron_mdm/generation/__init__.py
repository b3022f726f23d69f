"""Decoding, prompts and the display of samples, over callables that give logits."""
