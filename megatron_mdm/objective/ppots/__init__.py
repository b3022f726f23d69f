"""P-POTS (arXiv 2511.18159): the importance-sampled density of the masking rate."""
