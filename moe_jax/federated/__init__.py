"""Federated training on long-tailed classes: RedGrape and the methods beside it."""
