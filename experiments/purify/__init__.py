"""Attacks that are planted, and weights that are put back; see `__main__`."""

METHODS = ('purify', 'mixing', 'pruning')  # what a reset does
