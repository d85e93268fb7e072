"""Checkpoints that are written whole, verified when read, and never overwritten by worse ones."""
