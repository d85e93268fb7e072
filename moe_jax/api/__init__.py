"""What `import moe_jax` offers: `load`, `train` and the `Run` that both return."""
