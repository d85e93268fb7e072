"""What is refused before a run begins; refusals of whole runs are in test_train_run."""

import json
import types

import jax
import pytest

from moe_jax import errors
from moe_jax.devices import partitioning
from moe_jax.models.experts import sorted_plan
from moe_jax.runs import checks, trained_run
from tests import tiny


def test_rows_that_overflow_the_sort_key_are_refused_with_the_largest_that_do_not():
  # 16 tokens x 2 choices per row; 100,000 experts leave 14 bits: 16,384 choices = 512 rows.
  assert sorted_plan.max_choices(100_000) == 2**14
  sizes = {'model__moe__num_experts': 100_000, 'train__batch_size': 1024}
  mesh = tiny.mesh(data=1)
  with pytest.raises(errors.InputError, match='puts 1024 rows on a device.* of at most 512'):
    checks._check_sort_key(tiny.make(**sizes), mesh)
  checks._check_sort_key(tiny.make(**sizes, train__micro_batch_size=512), mesh)
  two = tiny.make(**sizes, mesh__data=2)
  checks._check_sort_key(two, partitioning.make_mesh(two.mesh, jax.devices()[:2]))


@pytest.mark.parametrize(
  'impl, axes, words',
  [
    ('dot_product', {'sequence': 2}, "impl='dot_product' attends with whole rows, and config.mesh"),
    ('splash', {'data': 2}, "impl='splash' is a TPU kernel, and the platform is 'cpu'"),
    ('tokamax', {'data': 2}, "impl='tokamax'"),
  ],
)
def test_kernels_that_cannot_run_are_refused_before_anything_is_made(impl, axes, words):
  sizes = {f'mesh__{name}': size for name, size in axes.items()}
  cfg = tiny.make(model__attention__impl=impl, **sizes)
  with pytest.raises(errors.InputError, match=words):
    checks.check_mesh(cfg, tiny.mesh(**axes))
  checks.check_mesh(tiny.make(model__attention__impl='auto', **sizes), tiny.mesh(**axes))


def corpus(fingerprint='same'):
  return types.SimpleNamespace(
    fingerprint=fingerprint, tokenizer=types.SimpleNamespace(to_json=lambda: 'a tokenizer')
  )


def test_a_run_goes_on_under_its_own_text_and_config_only():
  cfg = tiny.make()
  meta = json.loads(json.dumps(trained_run.meta(cfg, corpus()))) | {'step': 7}
  checks.check_continues(cfg, meta, corpus(), allow=False)
  with pytest.raises(errors.InputError, match='changed since the checkpoint of step 7'):
    checks.check_continues(cfg, meta, corpus('another'), allow=False)
  longer = tiny.make(train__num_steps=cfg.train.num_steps + 1)
  with pytest.raises(errors.InputError, match=r'train\.num_steps: 20 -> 21'):
    checks.check_continues(longer, meta, corpus(), allow=False)
  checks.check_continues(longer, meta | {'step': 20}, corpus(), allow=False)  # it was finished
  changed = tiny.make(optim__peak_lr=0.5)
  with pytest.raises(errors.InputError, match=r'optim\.peak_lr: 0\.01 -> 0\.5'):
    checks.check_continues(changed, meta, corpus(), allow=False)
  checks.check_continues(changed, meta, corpus('another'), allow=True)
  with pytest.raises(errors.InputError, match='another tokenizer'):
    checks.check_continues(cfg, meta | {'tokenizer': 'x'}, corpus(), allow=True)


def test_a_router_with_one_renormalised_gate_is_warned_of(caplog):
  for k, norm, warned in ((1, True, True), (1, False, False), (2, True, False)):
    caplog.clear()
    moe = {'model__moe__num_experts_per_tok': k, 'model__moe__norm_topk_prob': norm}
    checks._warn_of_single_gate(tiny.make(**moe).model)
    assert ('gets no gradient' in caplog.text) == warned


def test_a_sample_of_one_row_cannot_compete_in_a_group():
  drops = {'model__moe__capacity__policy': 'score', 'model__moe__capacity__group_rows': 4}
  checks._check_sample_group(tiny.make(**drops, model__moe__capacity__at_eval=False).model)
  with pytest.raises(errors.InputError, match="group_rows=4 with at_eval.*sample_prompt=''"):
    checks._check_sample_group(tiny.make(**drops, model__moe__capacity__at_eval=True).model)
