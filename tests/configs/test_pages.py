"""Every config page and every variant of it loads, obeys the rules and builds abstractly.

And what is said to be matched is: sizes, starting weights and data of presets that are compared.
"""

import bisect
import functools
import importlib
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import loss_free, routing, smoke
from moe_jax.balance import balance_losses
from moe_jax.config import batch_sizes, parse, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.planning import flops
from moe_jax.post_training import expert_config, inherited_model
from moe_jax.training import optim
from tests import tiny

PAGES = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'recipes', 'sizes')  # what pages share
)


def specs():
  """Pages and variants as (page, variant); a page lists its variants in VARIANTS."""
  for page in PAGES:
    module = importlib.import_module(f'configs.{page}')
    yield page, ''
    for variant in getattr(module, 'VARIANTS', ()):
      yield page, variant


def values_of(page: str, variant: str, source: pathlib.Path) -> dict:
  """Values of a page; one that tunes another run is given one of the page smoke."""
  get_config = importlib.import_module(f'configs.{page}').get_config
  values = (get_config(variant) if variant else get_config()).to_dict()
  if not values['objective']['inherit']:
    return values
  (source / 'config.json').write_text(json.dumps({'config': smoke.get_config().to_dict()}))
  values = inherited_model.applied(values | {'init_from': str(source)})
  if values['trainable']['kind'] == 'all':
    return values
  layers = range(values['model']['num_dense_layers'], values['model']['num_layers'])
  path = source / 'expert_cfg.json'
  chosen = expert_config.ExpertConfig({layer: [0] for layer in layers}, False, False)
  expert_config.write(path, chosen)
  return expert_config.applied(
    values | {'trainable': values['trainable'] | {'expert_config': str(path)}}
  )


@pytest.mark.parametrize('page, variant', list(specs()))
def test_page_builds_abstractly(page, variant, tmp_path):
  values = parse.from_dict(values_of(page, variant, tmp_path))
  params = model_variables.abstract_params(values.model)

  def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  # The closed form agrees with the real model, so MFU counts what is trained.
  count = flops.count_parameters(values.model)
  assert size(params.get('mtp_layers', {})) == count.mtp
  assert size(params) == count.total + count.mtp
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
  assert dtypes == {values.model.param_dtype}
  assert flops.train_flops_per_token(values.model) > 0


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'base'])
def test_pages_say_how_to_run_them(page):
  text = importlib.import_module(f'configs.{page}').__doc__
  assert f'--config=configs/{page}.py' in text
  assert 'Expect' in text


@pytest.mark.parametrize(
  'page',
  ['deepseekmoe_2b', 'deepseekmoe_16b', 'deepseekmoe_145b', 'routing', 'loss_free', 'attention']
  + ['deepseek_v2', 'deepseek_v2_lite', 'deepseek_v3', 'deepseek_coder_v2_lite'],
)
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


def preset(page: str, variant: str = '') -> schema.Config:
  get_config = importlib.import_module(f'configs.{page}').get_config
  return parse.from_dict((get_config(variant) if variant else get_config()).to_dict())


def changed(old: schema.Config, new: schema.Config) -> set[str]:
  """The keys in which two configs differ."""
  lines = parse.diff(parse.to_dict(old), parse.to_dict(new))
  return {line.partition(':')[0] for line in lines}


def sizes(model: schema.ModelConfig) -> tuple[int, int]:
  """(all parameters, activated ones), routers not counted."""
  total, activated = flops.count_parameters(model), flops.count_activated(model)
  return total.total - total.router, activated.total - activated.router


@pytest.mark.parametrize('page', ['quickstart', 'reasoner'])
def test_conventional_experts_match_the_page(page):
  """A dense model has the activated parameters alone; its FFN is of the width that is activated."""
  fine, gshard, dense = (preset(page, variant).model for variant in ('', 'gshard', 'dense'))
  assert sizes(gshard) == sizes(fine)
  assert sizes(dense)[1] == sizes(fine)[1]


def test_the_small_reasoner_has_a_dense_twin():
  small, dense = (preset('reasoner', variant) for variant in ('small', 'small_dense'))
  assert not dense.model.is_moe and sizes(dense.model)[1] == sizes(small.model)[1]
  keys = {key for key in changed(small, dense) if not key.startswith(('model.', 'paper.'))}
  assert not keys  # the same data, steps and rates


# The ladder of DeepSeekMoE

LADDERS = ('deepseekmoe_tiny', 'deepseekmoe_mini', 'deepseekmoe_small', 'deepseekmoe_2b')
ACTIVATED_LIKE_THE_PAGE = ('gshard', '1_15', '1_31', 'shared_2', 'shared_4')
AS_LARGE_AS_THE_PAGE = (*ACTIVATED_LIKE_THE_PAGE, 'hash', 'switch', 'dense_x16', 'half')


def test_every_size_has_the_whole_ladder():
  names = [list(importlib.import_module(f'configs.{page}').VARIANTS) for page in LADDERS]
  assert all(name == names[0] for name in names)
  others = ['gshard_x1.2', 'gshard_x1.5', 'dense', 'dense_x4']
  assert sorted(names[0]) == sorted([*AS_LARGE_AS_THE_PAGE, *others])


@pytest.mark.parametrize('page', LADDERS)
def test_the_ladder_is_matched_where_the_paper_says_so(page):
  # 2B: thirds of an integer are rounded, which is 3e-4 of the model.
  rel = 1e-3 if page == 'deepseekmoe_2b' else 0
  total, activated = sizes(preset(page).model)
  for variant in AS_LARGE_AS_THE_PAGE:
    assert sizes(preset(page, variant).model)[0] == pytest.approx(total, rel=rel), variant
  for variant in ACTIVATED_LIKE_THE_PAGE:
    assert sizes(preset(page, variant).model)[1] == pytest.approx(activated, rel=rel), variant
  # One whole FFN per token in both; `half` has 1 + 3 quarters.
  least = sizes(preset(page, 'dense').model)[1]
  for variant in ('hash', 'switch', 'half'):
    assert sizes(preset(page, variant).model)[1] == pytest.approx(least, rel=rel), variant


# The routing page

ROUTING_NAMES = """
  deepseekmoe deepseekmoe_norm sigmoid gshard switch hash hash_balanced expert_choice
  device_limited_v2 group_limited_v3 loss_free loss_free_softmax loss_free_multiplicative v3 skywork
  ds_moe dense balanced skewed expert_choice_shuffled gshard_dropless loss_free_proportional
  v2_dropping
""".split()


def test_routing_names_are_kept():
  # The README and the experiments call them by these names.
  assert set(ROUTING_NAMES) <= routing.VARIANTS.keys()


def test_routing_summary_has_a_line_for_every_variant():
  assert list(routing.SUMMARY) == list(routing.VARIANTS)
  for what, paper in routing.SUMMARY.values():
    assert 10 < len(what) <= 60 and re.fullmatch(r'[0-9]{4}\.[0-9]{5}|-', paper)


@pytest.mark.parametrize('variant', routing.VARIANTS)
def test_routing_presets_differ_in_routing_only(variant):
  allowed = {'model.attention.num_experts', 'model.mlp_dim', 'train.sample_prompt'}
  keys = changed(preset('routing'), preset('routing', variant))
  assert {key for key in keys if not key.startswith('model.moe.')} <= allowed
  assert 'model.moe.num_virtual_devices' not in keys


def test_routing_and_the_tiny_ladder_share_their_common_presets():
  assert preset('routing') == preset('routing', 'deepseekmoe') == preset('deepseekmoe_tiny')
  assert preset('routing', 'gshard_dropless') == preset('deepseekmoe_tiny', 'gshard')


def test_routing_presets_have_the_same_size():
  total, activated = sizes(preset('routing').model)
  fewer, more = {'switch', 'hash', 'hash_balanced'}, {'ds_moe'}
  for variant in routing.VARIANTS:
    model = preset('routing', variant).model
    if variant != 'dense':
      assert sizes(model)[0] == total, variant
    if variant not in fewer | more:
      assert sizes(model)[1] == activated, variant
  # What ds_moe activates when its inference rule is topk.
  assert sizes(preset('routing', 'ds_moe').model)[1] == total
  moe, reference = preset('routing', 'ds_moe').model.moe, preset('routing').model.moe
  assert moe.num_experts_per_tok == reference.num_shared_experts + reference.num_experts_per_tok


def test_gshard_has_the_capacity_and_the_loss_that_its_page_says():
  moe = preset('routing', 'gshard').model.moe
  tokens = 160
  capacity = moe.capacity.factor * moe.num_experts_per_tok * tokens / moe.num_experts
  assert capacity == 2 * tokens / moe.num_experts
  switch = preset('routing', 'switch').model.moe.balance.switch.weight
  at_balance = balance_losses.value_at_balance('gshard', moe)
  assert moe.balance.gshard.weight * at_balance == pytest.approx(switch)


def test_v3_and_its_group_limit_differ_in_balancing_only():
  keys = changed(preset('routing', 'group_limited_v3'), preset('routing', 'v3'))
  balancing = ('model.moe.expert_bias.', 'model.moe.balance.')
  assert keys and all(key.startswith(balancing) for key in keys)


# Matched by proof: presets start from the same weights and see the same data


@functools.cache
def start(variant: str, page: str = 'routing') -> dict[tuple[int | None, str], np.ndarray]:
  """(number of the layer in the model or None, name) -> array, of one seed."""
  model = preset(page, variant).model

  def init():
    return partitioning.unbox(model_variables.init(model, jax.random.key(7))['params'])

  first = {'dense_layers': 0, 'moe_layers': model.num_layers - model.num_moe_layers}
  found = {}
  for path, array in traverse_util.flatten_dict(tiny.jit(init)(), sep='/').items():
    stack, _, name = path.partition('/')
    if stack in first:
      found |= {(first[stack] + i, name): layer for i, layer in enumerate(np.asarray(array))}
    else:
      found[None, path] = np.asarray(array)
  return found


def outside_of_experts(variant: str) -> dict[tuple[int | None, str], np.ndarray]:
  """All but FFNs, experts and routers."""

  def is_routing(name):
    return name.startswith(('moe/', 'mlp/')) or name == 'attention/router'

  return {key: value for key, value in start(variant).items() if not is_routing(key[1])}


def test_the_reference_has_every_weight_once():
  reference = outside_of_experts('')
  layers = preset('routing').model.num_layers
  attention = {f'attention/{name}' for name in 'qkvo'}
  norms = {'attention_norm/scale', 'ffn_norm/scale'}
  per_layer = {(i, name) for i in range(layers) for name in attention | norms}
  assert reference.keys() == per_layer | {
    (None, n) for n in ('embedding', 'head', 'final_norm/scale')
  }
  drawn = [value for (_, name), value in start('').items() if not name.endswith('scale')]
  assert len({value.tobytes() for value in drawn}) == len(drawn)  # no two are copies


@pytest.mark.parametrize('variant', routing.VARIANTS)
def test_routing_presets_start_from_the_same_weights(variant):
  reference, found = outside_of_experts(''), outside_of_experts(variant)
  assert found.keys() == reference.keys()
  for key in reference:
    np.testing.assert_array_equal(found[key], reference[key], err_msg=str(key), strict=True)


def test_experts_of_one_shape_start_from_the_same_weights():
  seen, compared = {}, set()
  for variant in routing.VARIANTS:
    for (layer, name), value in start(variant).items():
      if not name.startswith('moe/'):
        continue
      first = seen.setdefault((layer, name, value.shape), value)
      np.testing.assert_array_equal(value, first, err_msg=f'{variant} {layer} {name}')
      compared |= {(variant, name)} if value is not first else set()
  shared = {variant for variant, name in compared if name == 'moe/shared/gate_up'}
  experts = {variant for variant, name in compared if name == 'moe/down'}
  # The first of each kind has nobody to be compared with; nor have ds_moe and dense.
  fine = [v for v in routing.VARIANTS if preset('routing', v).model.moe.num_shared_experts]
  coarse = [v for v in routing.VARIANTS if preset('routing', v).model.moe.num_experts == 16]
  assert shared == set(fine[1:]) and experts == {*fine[1:], *coarse[1:]}


@pytest.mark.parametrize('variant', ['hash_balanced', 'expert_choice', 'dense'])
def test_routing_presets_see_the_same_data(variant, tmp_path):
  overrides = {
    'data.source': 'synthetic',
    'data.synthetic_documents': 60,
    'data.heldout_fraction': 0.2,
    'data.tokenizer': 'bytes',
    'data.cache_dir': str(tmp_path),
  }

  def batches(name):
    page = routing.get_config(name)
    page.update_from_flattened_dict(overrides)
    cfg = parse.from_dict(page.to_dict())
    corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, progress=False)
    stream = pipeline.train_batches(
      corpus,
      seed=cfg.train.seed,
      max_seq_len=cfg.model.max_seq_len,
      batch_sizes=batch_sizes.of(cfg.train),
      start_step=0,
      num_steps=cfg.train.num_steps,
    )
    found = [next(stream) for _ in range(3)]
    stream.close()
    return found

  for step, (ours, theirs) in enumerate(zip(batches(''), batches(variant), strict=True)):
    assert ours.keys() == theirs.keys()
    for key in ours:
      np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f'{step} {key}', strict=True)


# Loss-free balancing


def test_loss_free_has_every_method_at_every_size():
  methods = 'aux loss_free proportional multiplicative softmax_aux softmax_loss_free'.split()
  sizes_of_it = ('tiny', 'mini', 'small', '1b', '3b')
  names = [f'{size}_{method}' for size in sizes_of_it for method in methods]
  assert list(loss_free.VARIANTS) == names
  assert preset('loss_free') == preset('loss_free', 'tiny_loss_free')


@pytest.mark.parametrize('size', loss_free.SIZES)
def test_loss_free_methods_differ_in_balancing_and_scores_only(size):
  reference = preset('loss_free', f'{size}_aux')
  for method in loss_free.METHODS:
    allowed = ('model.moe.expert_bias.', 'model.moe.balance.', 'model.moe.score_func')
    keys = changed(reference, preset('loss_free', f'{size}_{method}'))
    assert all(key.startswith(allowed) for key in keys), method
    assert bool(keys) == (method != 'aux')


@pytest.mark.parametrize(
  'size, total, activated, tokens, rates',  # sheet papers/loss_free_balancing.md, section 3
  [
    ('1b', '1.05', '0.23', '94.4', {999: '1.00e-03', 39_999: '1.00e-04'}),
    (
      '3b',
      '2.55',
      '0.46',
      '200.0',
      {1999: '7.80e-04', 45_210: '7.80e-04', 45_211: '2.47e-04', 50_861: '2.47e-04'}
      | {50_862: '7.80e-05', 56_513: '7.80e-05'},
    ),
  ],
)
def test_loss_free_sizes_are_the_papers(size, total, activated, tokens, rates):
  cfg = preset('loss_free', f'{size}_loss_free')
  assert f'{flops.count_parameters(cfg.model).total / 1e9:.2f}' == total
  assert f'{flops.count_activated(cfg.model).total / 1e9:.2f}' == activated
  seen = cfg.train.num_steps * cfg.train.batch_size * cfg.model.max_seq_len
  assert f'{seen / 1e9:.1f}' == tokens
  schedule = optim.learning_rate(cfg.optim, cfg.train.num_steps)
  assert {step: f'{float(schedule(step)):.2e}' for step in rates} == rates


# DeepSeek LLM, V2, V3, Coder-V2


def tokens_until(cfg: schema.Config, step: int) -> int:
  """Tokens seen before `step`, one batch after the other as the loop asks for them."""
  ends = [until for until, _ in cfg.train.batch_ramp]
  changes = sorted({0, step, *(end for end in ends if end < step)})
  rows = sum(
    (end - start) * batch_sizes.of(cfg.train).at(start) for start, end in zip(changes, changes[1:])
  )
  return rows * cfg.model.max_seq_len


def step_at(cfg: schema.Config, tokens: float) -> int:
  """The first step before which at least this many tokens have been seen."""
  return bisect.bisect_left(
    range(cfg.train.num_steps), tokens, key=lambda step: tokens_until(cfg, step)
  )


@pytest.mark.parametrize(
  'spec, trillions',  # sheets papers/deepseek_{llm,v2,coder_v2}.md and hf_checkpoints.md
  [
    ('deepseek_llm_7b', 2.0),
    ('deepseek_llm_67b', 2.0),
    ('deepseek_v2_lite', 5.7),
    ('deepseek_v2_lite:mha', 1.33),
    ('deepseek_v2_lite:long', 1000 * 576 * 32_768 / 1e12),
    ('deepseek_v2', 8.1),
    ('deepseek_v2:long', 1000 * 576 * 32_768 / 1e12),
    ('deepseek_v3', 14.8),
    ('deepseek_v3:long_32k', 1000 * 1920 * 32_768 / 1e12),
    ('deepseek_v3:long_128k', 1000 * 480 * 131_072 / 1e12),
    ('deepseek_coder_v2_lite', 6.0),
    ('deepseek_coder_v2_lite:long_32k', 1000 * 1152 * 32_768 / 1e12),
    ('deepseek_coder_v2_lite:long_128k', 1000 * 288 * 131_072 / 1e12),
  ],
)
def test_deepseek_tokens(spec, trillions):
  cfg = preset(*spec.split(':'))
  assert tokens_until(cfg, cfg.train.num_steps) == pytest.approx(trillions * 1e12, rel=1e-5)


@pytest.mark.parametrize(
  'page, first, last, tokens',
  [('deepseek_v2', 2304, 9216, 225e9), ('deepseek_v3', 3072, 15_360, 469e9)],
)
def test_the_batch_grows_over_the_tokens_of_the_paper(page, first, last, tokens):
  cfg = preset(page)
  end = cfg.train.batch_ramp[-1][0]
  assert tokens_until(cfg, end) == pytest.approx(tokens, rel=1e-4)  # half a step
  sizes = [batch_sizes.of(cfg.train).at(step) for step in (0, end - 1, end)]
  assert sizes[0] == first and sizes[1] < sizes[2] == last
  assert all(size % 32 == 0 for _, size in cfg.train.batch_ramp)  # what the page says to use


@pytest.mark.parametrize(
  'page, trillions, rates',  # just before and just after each change
  [
    ('deepseek_v2', (4.855, 4.865, 7.285, 7.295), ('2.40e-04', '7.58e-05', '7.58e-05', '2.40e-05')),
    (
      'deepseek_v2_lite',
      (4.555, 4.565, 5.125, 5.135),
      ('4.20e-04', '1.33e-04', '1.33e-04', '4.19e-05'),
    ),
    ('deepseek_llm_7b', (1.599, 1.601, 1.801), ('4.20e-04', '1.33e-04', '4.19e-05')),
    ('deepseek_llm_67b', (1.599, 1.601, 1.801), ('3.20e-04', '1.01e-04', '3.20e-05')),
    ('deepseek_coder_v2_lite', (0.04, 5.9999), ('4.20e-04', '4.20e-05')),
    ('deepseek_v3', (10.0, 14.4, 14.7), ('2.20e-04', '2.20e-05', '7.30e-06')),
  ],
)
def test_learning_rates_by_tokens(page, trillions, rates):
  cfg = preset(page)
  schedule = optim.learning_rate(cfg.optim, cfg.train.num_steps)
  found = [float(schedule(step_at(cfg, 1e12 * tokens))) for tokens in trillions]
  assert [f'{rate:.2e}' for rate in found] == list(rates)


def test_v3_changes_at_the_tokens_of_the_report():
  cfg = preset('deepseek_v3')

  def until(share):
    return tokens_until(cfg, round(share * cfg.train.num_steps))

  ((share, weight),) = cfg.train.mtp_loss_ramp
  assert (until(share), weight) == (pytest.approx(10e12, rel=1e-5), 0.3)
  assert until(cfg.model.moe.expert_bias.update_until) == pytest.approx(14.3e12, rel=1e-5)


def test_llm_7b_is_the_dense_variant_of_the_16b_page():
  page, variant = preset('deepseek_llm_7b'), preset('deepseekmoe_16b', 'dense_7b')
  keys = changed(page, variant)
  # Without an expert, nothing but their number has an effect.
  assert not page.model.is_moe
  assert all(key.startswith('model.moe.') for key in keys), keys


LONG = [
  ('deepseek_v2_lite', 'long', 0.1147214),
  ('deepseek_v2', 'long', 0.1147214),
  ('deepseek_coder_v2_lite', 'long_32k', 0.1147214),
  ('deepseek_coder_v2_lite', 'long_128k', 0.1147214),
  ('deepseek_v3', 'long_32k', 0.1352338),
  ('deepseek_v3', 'long_128k', 0.1352338),
]


@pytest.mark.parametrize('page, variant, scale', LONG)
def test_long_stages_go_on_with_the_same_model(page, variant, scale):
  before, after = preset(page), preset(page, variant)
  stage = {'model.max_seq_len', 'model.moe.expert_bias.update_rate'}
  prefixes = ('model.attention.rope.yarn.', 'optim.', 'train.')
  keys = changed(before, after)
  assert {key for key in keys if not key.startswith(prefixes)} <= stage
  # Sheet papers/hf_checkpoints.md, section 4; without YaRN 192^-0.5.
  assert before.model.attention.softmax_scale == pytest.approx(192**-0.5)
  assert after.model.attention.softmax_scale == pytest.approx(scale, abs=1e-7)


def test_coder_is_v2_lite_on_other_data():
  keys = changed(preset('deepseek_v2_lite'), preset('deepseek_coder_v2_lite'))
  allowed = {'data.fim_rate', 'optim.schedule', 'train.num_steps', 'optim.multi_step_boundaries'}
  assert keys <= allowed and 'data.fim_rate' in keys


# The page of attentions


@pytest.mark.parametrize(
  'variant, weights, cached',  # of 3 layers: the table of the page
  [('mha', 49_152, 384), ('gqa', 49_152, 192), ('mqa', 49_152, 96), ('mla', 50_688, 120)],
)
def test_attentions_have_the_sizes_of_their_page(variant, weights, cached):
  cfg = preset('attention', variant)
  assert flops.count_parameters(cfg.model).attention == weights
  assert flops.kv_cache_elements_per_token(cfg.model) == cached
  text = importlib.import_module('configs.attention').__doc__
  (line,) = [line for line in text.splitlines() if line.split()[:1] == [variant]]
  assert line.split()[-2:] == [f'{cached}', f'{weights:,}']
  keys = changed(preset('attention', 'mha'), cfg)
  assert all(key.startswith(('model.attention.', 'model.num_heads')) for key in keys)


def test_attentions_start_from_the_same_weights_elsewhere():
  heads, latent = start('mha', 'attention'), start('mla', 'attention')
  elsewhere = {key for key in heads if not key[1].startswith('attention/')}
  assert elsewhere == {key for key in latent if not key[1].startswith('attention/')}
  assert {name for _, name in elsewhere} >= {'moe/router', 'moe/down', 'embedding', 'head'}
  for key in elsewhere:
    np.testing.assert_array_equal(heads[key], latent[key], err_msg=str(key), strict=True)
