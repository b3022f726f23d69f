"""A checkpoint as a model without its training run, and what is measured with it."""
