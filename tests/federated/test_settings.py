import dataclasses
import math

import pytest

from moe_jax import errors
from moe_jax.federated import settings


def test_the_data_set_decides_what_is_left_open():
  found = settings.resolve(settings.Settings(clients=50, clients_per_round=10, dataset='cifar100'))
  assert (found.encoder, found.threshold, found.climb_rate) == ('resnet', 2, 0.1)
  assert found.clients_per_round == 10 and found.climb_tolerance == 0.1
  found = settings.resolve(settings.Settings(dataset='mnist', threshold=3, climb_tolerance=0.0))
  assert (found.encoder, found.threshold, found.climb_rate) == ('cnn', 3, 2.0)
  assert found.climb_tolerance == 0 and found.clients_per_round == found.clients
  assert settings.resolve(found) == found


@pytest.mark.parametrize(
  'change, words',
  [
    ({'method': 'redgrap'}, "--method=redgrap must be .*did you mean 'redgrape'"),
    ({'dataset': 'imagenet'}, '--dataset=imagenet must be one of digits, mnist'),
    ({'encoder': 'vit'}, '--encoder=vit must be one of mlp, cnn, resnet'),
    ({'clients_per_round': 11}, '--clients_per_round=11 must be at most --clients=10'),
    ({'imbalance': 0.5}, '--imbalance=0.5 must be at least 1'),
    ({'alpha': 0.0}, '--alpha=0.0 must be above 0'),
    ({'alpha': 1e10}, '--alpha=1e.10 must be at most 1e.09; 1e6 gives every client the shares'),
    ({'alpha': math.inf}, '--alpha=inf must be at most 1e.09; 1e6 gives every client the shares'),
    ({'climb_rate': -0.1}, '--climb_rate=-0.1 must be at least 0'),
    ({'momentum': 1.0}, '--momentum=1.0 must be below 1'),
    ({'threshold': -1}, '--threshold=-1 must be at least 1'),
  ],
)
def test_rules(change, words):
  with pytest.raises(errors.InputError, match=words):
    settings.resolve(settings.Settings(**change))


@pytest.mark.parametrize('value', (math.inf, math.nan))
def test_every_number_is_finite(value):
  floats = [f.name for f in dataclasses.fields(settings.Settings) if isinstance(f.default, float)]
  assert len(floats) >= 12
  for name in floats:
    with pytest.raises(errors.InputError, match=f'--{name}={value} must be (a finite|at most)'):
      settings.resolve(settings.Settings(**{name: value}))


def test_every_field_says_what_it_means():
  assert all(field.metadata['help'] for field in dataclasses.fields(settings.Settings))
