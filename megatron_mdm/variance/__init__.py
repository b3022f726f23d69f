"""The variance of training and its parts: masking pattern, masking rate, data; and of methods."""
