"""Random configs: broken ones are refused in one line, valid ones train, are saved and decode."""

import os
import random

import jax
import pytest

from experiments.torture import fuzz, random_configs
from moe_jax.config import parse
from tests import tiny


def test_broken_configs_are_refused_in_one_line_that_names_the_field(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  base, rng, refused = tiny.values(), random.Random(0), 0
  while refused < 500:
    change, values, must = random_configs.broken(base, rng)
    line = random_configs.refusal(values)
    assert line or not must, f'accepted: {change}'
    refused += bool(line)
  assert not list(tmp_path.iterdir())


def test_valid_configs_have_every_router_and_dispatch():
  base, rng = tiny.values(), random.Random(0)
  found = [random_configs.valid(base, rng, i).model for i in range(len(random_configs.ROUTERS))]
  assert {model.moe.router for model in found} == set(random_configs.ROUTERS)
  assert {'dense', 'dropless', 'capacity'} <= {model.moe.dispatch for model in found}
  assert {model.attention.kind for model in found} == {'gqa', 'mla'}


def try_(tmp_path, numbers):
  base, rng = fuzz.values(tmp_path / 'cache'), random.Random(0)
  for number in numbers:
    cfg, mesh = fuzz.draw(base, rng, number)
    try:
      fuzz.try_one(cfg, mesh, tmp_path / str(number))
    except Exception as error:
      changes = '; '.join(parse.diff(base, parse.to_dict(cfg)))
      raise AssertionError(f'config {number}: {changes}') from error
    jax.clear_caches()


@pytest.mark.slow
def test_valid_configs_train_are_saved_restored_and_decoded(tmp_path):
  """`python -m experiments.torture --parts=fuzz` tries hundreds."""
  try_(tmp_path, range(int(os.environ.get('MOE_JAX_FUZZ', '12'))))
