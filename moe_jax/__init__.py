"""moe_jax: DeepSeek's mixture-of-experts language models in JAX and Flax linen."""

__version__ = '0.2.0'
