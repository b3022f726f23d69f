"""Rehearses a launch on a CPU: one process plays each kind of rank of a cluster."""
