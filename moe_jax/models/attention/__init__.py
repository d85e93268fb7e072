"""Attention: multi-head and latent, rotary positions, kernels."""
