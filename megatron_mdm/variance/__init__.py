"""The variance of training, its parts and its value under each method (arXiv 2511.18159).

The parts are the masking pattern, the masking rate and the data.
"""
