"""Structured pruning: which parts of a model go, how they are driven out, and the smaller plain model that is left."""
