"""Which backend of the experts a config gets on which platform."""

import importlib.util

import jax
import pytest

from moe_jax import errors
from moe_jax.config import moe_config
from moe_jax.models.experts import backends


def test_backends_are_those_of_the_config():
  known = {'auto', *backends.BACKENDS, *moe_config.LOW_PRECISION}
  assert known == set(moe_config.GROUPED_MATMULS)
  assert set(backends.PLATFORM_DEFAULT) == set(backends.LOW_PRECISION)
  assert set(backends.PLATFORM_DEFAULT.values()) <= set(backends.BACKENDS)


def test_auto_is_blocks_on_cpu():
  assert jax.default_backend() == 'cpu'
  assert backends.choose('auto').name == 'blocks'


def test_missing_tokamax_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.InputError, match=r"grouped_matmul.*pip install 'moe_jax\[cuda\]'"):
    backends.BACKENDS['tokamax']()
