"""A checkpoint as a model without its training run, and measurements of that model."""
