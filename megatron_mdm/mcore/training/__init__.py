"""The training step, and what happens after gradients and after evaluations."""
