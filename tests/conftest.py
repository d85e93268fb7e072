"""Runs before any test module is imported: several CPU devices, so that shardings can be tested."""

import jax

jax.config.update('jax_num_cpu_devices', 8)
