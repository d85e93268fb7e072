"""Random configs: broken ones are refused in one line; valid ones have everything in them.

`python -m experiments.torture --parts=fuzz` trains, saves and decodes the valid ones.
"""

import random

from experiments.torture import random_configs
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
