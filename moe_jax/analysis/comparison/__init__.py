"""Finished and unfinished runs beside each other: groups, budgets, curves, verdicts, a page."""
