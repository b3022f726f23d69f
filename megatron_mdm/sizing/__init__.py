"""FLOPs, memory and number of nodes of a training run, computed before it starts."""
