"""Purification of a stranger's fine-tuning: attacks to try it on, indicator, resets, baselines.

After "Diffusion Theory as a Scalpel" (arXiv 2305.04547), of which only the abstract was at hand:
the formulas are a reconstruction.
"""
