"""Every config page and every variant of it loads, obeys the rules and builds abstractly."""

import importlib
import math
import pathlib

import jax
import pytest

from moe_jax import config, flops
from moe_jax.models import transformer

PAGES = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
  if path.stem != '__init__'
)


def specs():
  """Pages and variants as (page, variant); a page lists its variants in VARIANTS."""
  for page in PAGES:
    module = importlib.import_module(f'configs.{page}')
    yield page, ''
    for variant in getattr(module, 'VARIANTS', ()):
      yield page, variant


@pytest.mark.parametrize('page, variant', list(specs()))
def test_page_builds_abstractly(page, variant):
  get_config = importlib.import_module(f'configs.{page}').get_config
  values = config.from_dict((get_config(variant) if variant else get_config()).to_dict())
  shapes = jax.tree.leaves(transformer.abstract_params(values.model))
  # The closed form agrees with the real model, so MFU counts what is trained.
  assert sum(math.prod(leaf.shape) for leaf in shapes) == flops.count_parameters(values.model).total
  assert {leaf.dtype.name for leaf in shapes} == {values.model.param_dtype}
  assert flops.train_flops_per_token(values.model) > 0


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'base'])
def test_pages_say_how_to_run_them(page):
  text = importlib.import_module(f'configs.{page}').__doc__
  assert f'--config=configs/{page}.py' in text
  assert 'Expect' in text


@pytest.mark.parametrize('page', ['deepseekmoe_2b', 'deepseekmoe_16b', 'deepseekmoe_145b'])
def test_unknown_variant_names_the_known_ones(page):
  module = importlib.import_module(f'configs.{page}')
  with pytest.raises(ValueError, match="'nonsense'.*" + sorted(module.VARIANTS)[0]):
    module.get_config('nonsense')


@pytest.mark.parametrize(
  'page, tokens', [('deepseekmoe_2b', 104.9e9), ('deepseekmoe_16b', 2.009e12)]
)
def test_steps_times_batch_is_the_tokens_of_the_sheet(page, tokens):
  values = importlib.import_module(f'configs.{page}').get_config()
  seen = values.train.num_steps * values.train.batch_size * values.model.max_seq_len
  assert seen == pytest.approx(tokens, rel=1e-3)


def test_145b_tokens():
  module = importlib.import_module('configs.deepseekmoe_145b')
  for variant in ('', *module.VARIANTS):
    values = module.get_config(variant)
    seen = values.train.num_steps * values.train.batch_size * values.model.max_seq_len
    assert seen == pytest.approx(245.4e9, rel=1e-3)
