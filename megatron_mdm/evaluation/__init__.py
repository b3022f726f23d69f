"""NELBO and log-likelihoods, over callables that give logits."""
