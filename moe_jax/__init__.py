"""moe_jax: DeepSeek's mixture-of-experts language models in JAX and Flax linen.

    import moe_jax
    run = moe_jax.train('quickstart', 'runs/first')  # or moe_jax.load(a run, or a download)
    run.logits('The theory of relativity')  # [L, V]
    run.generate(['def main('], max_new_tokens=64)
    run.routing('some text')  # experts, gates and load of every layer
    run.evaluate()  # held-out figures
    moe_jax.compare('runs/first', 'runs/second')  # what differs, and whether it is real

JAX is imported at the first use, not with the package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_jax.errors import InputError

if TYPE_CHECKING:
  from moe_jax.api.compare import Comparison, compare
  from moe_jax.api.load import load
  from moe_jax.api.run import Routing, Run
  from moe_jax.api.train import train

__version__ = '0.2.0'
__all__ = [
  'Comparison',
  'InputError',
  'Routing',
  'Run',
  '__version__',
  'compare',
  'load',
  'train',
]

_HOMES = {
  'Comparison': 'compare',
  'compare': 'compare',
  'load': 'load',
  'Routing': 'run',
  'Run': 'run',
  'train': 'train',
}


def __getattr__(name: str) -> Any:
  """A name of `__all__` out of `moe_jax.api`, imported when it is first asked for."""
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'moe_jax.api.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
