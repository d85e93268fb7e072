"""Flags of XLA with which tests compile: most of their time is compilation."""

import jax

# Without the emitters a training step compiles in half the time. Newer XLAs have no other way.
_EMITTERS = ' --xla_cpu_use_fusion_emitters=false' if jax.__version_info__ < (0, 11) else ''
FLAGS = f'--xla_backend_optimization_level=0{_EMITTERS}'
