"""The parts of training variance: masking pattern, masking rate, data (arXiv 2511.18159)."""
