import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import errors
from moe_jax.api import load
from moe_jax.checkpoints import stream_writer
from moe_jax.config import parse
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.interop import source
from moe_jax.models import model_variables
from moe_jax.post_training import adapters
from moe_jax.runs import run_record, trained_run
from moe_jax.training import trainable
from tests import tiny

SIZES = {'model__vocab_size': 300, 'model__moe__expert_bias__update_rule': 'sign'}
BASE = SIZES | {'data__tokenizer': 'bytes'}
SUMS = {
  'init_from': 'base',
  'trainable__kind': 'experts',
  'trainable__experts': ((5, 1), (2,)),
}
CODE = SUMS | {'trainable__experts': ((), (2, 7)), 'trainable__shared_experts': True}
ALL = CODE | {'trainable__non_expert_modules': True}


def variables(cfg, seed=0):
  biases = tiny.router_state(cfg.model)
  return jax.device_get({'params': tiny.params(cfg.model, seed), 'router_state': biases})


def write(workdir, cfg, values, step=7):
  """A run of which nothing is left but its last checkpoint."""
  tokenizer = tokenizer_lib.byte_tokenizer(cfg.data.bos_token, cfg.data.eos_token)
  meta = {
    'config': parse.to_dict(cfg),
    'tokenizer': trained_run.digest(tokenizer),
    'data_fingerprint': 'text',
  }
  with stream_writer.Writer(workdir / 'checkpoints', step, values, meta) as writer:
    for name, leaf in source.by_name(values).items():
      writer.write(name, (), leaf)
  tokenizer.save(workdir / 'tokenizer.json')
  run_record.write(workdir, cfg, argv=[], data_fingerprint='text')
  return values


def tuned(workdir, changes, seed):
  """A run whose trained weights are others than those of the base."""
  cfg = tiny.make(**BASE | changes)
  values = variables(cfg)
  part = trainable.select(cfg, tiny.params(cfg.model, seed))
  params = jax.device_get(trainable.merge(cfg, values['params'], part))
  return write(workdir, cfg, values | {'params': params})


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Directories of a base and three adapters; the weights of the base and the tuned runs."""
  root = tmp_path_factory.mktemp('adapters')
  found = {'base': write(root / 'base', tiny.make(**BASE), variables(tiny.make(**BASE)))}
  for seed, (name, changes) in enumerate([('sums', SUMS), ('code', CODE), ('all', ALL)], start=1):
    found[name] = tuned(root / f'{name}_run', changes, seed)
    adapters.extract(root / f'{name}_run', root / name, say=lambda line: None)
  return root, found


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)


def test_tensors_have_the_official_names(runs):
  root, found = runs
  tensors = safetensors.numpy.load_file(root / 'sums/model.safetensors')
  names = [
    f'model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight'
    for layer, e in ((1, 1), (1, 5), (2, 2))
    for kind in ('gate', 'up', 'down')
  ]
  assert sorted(tensors) == sorted(names)
  moe = found['sums']['params']['moe_layers']['moe']
  expert = 'model.layers.1.mlp.experts.5'
  np.testing.assert_array_equal(tensors[f'{expert}.up_proj.weight'].T, moe['gate_up'][0, 5, :, 1])
  np.testing.assert_array_equal(tensors[f'{expert}.down_proj.weight'].T, moe['down'][0, 5])
  marked = json.loads((root / 'sums/expert_cfg.json').read_text())
  assert marked == {
    'experts': {'1': [5, 1], '2': [2]},
    'shared_experts': False,
    'non_expert_modules': False,
  }
  names = safetensors.numpy.load_file(root / 'code/model.safetensors')
  assert {name.split('.')[4] for name in names} == {'experts', 'shared_experts'}
  assert len(names) == 3 * 2 + 3 * 2
  names = safetensors.numpy.load_file(root / 'all/model.safetensors')
  assert {'lm_head.weight', 'model.embed_tokens.weight', 'model.layers.2.mlp.gate.weight'} < {
    *names
  }
  assert not any('bias' in name for name in names)


def test_merged_is_the_tuned_run_and_every_reader_takes_it(runs, tmp_path):
  (root, found), name = runs, 'all'
  adapters.merge(root / 'base', root / name, tmp_path / 'merged', say=lambda line: None)
  run = trained_run.load(tmp_path / 'merged')
  assert_equal(run.variables, found[name])
  assert run.step == 7 and run.cfg.trainable.kind == 'all'


def test_adapters_are_swapped_over_one_base_in_memory(runs):
  root, found = runs
  base = trained_run.load(root / 'base')
  for name in ('code', 'sums'):
    run = adapters.applied(base, root / name)
    assert_equal(run.variables, found[name])
    # As the commands' --adapter has it.
    assert_equal(load.read(root / 'base', adapter=root / name).variables, found[name])
  head = base.variables['params']['head']
  assert run.variables['params']['head'] is head
  assert_equal(base.variables, found['base'])


def test_an_import_that_is_merged_is_no_import_as_it_came(runs, tmp_path):
  root, _ = runs
  cfg = tiny.make(**BASE)
  write(tmp_path / 'import', cfg, variables(cfg), step=0)
  adapters.merge(tmp_path / 'import', root / 'sums', tmp_path / 'merged', say=lambda line: None)
  assert trained_run.read_meta(tmp_path / 'merged')['step'] == 1


def changed(root, tmp_path, edit):
  """An adapter whose tensors were edited, in two files and by their old names."""
  tensors = safetensors.numpy.load_file(root / 'sums/model.safetensors')
  tensors = {name.removeprefix('model.'): tensor for name, tensor in tensors.items()}
  edit(tensors)
  folder = tmp_path / 'changed'
  folder.mkdir()
  (folder / 'expert_cfg.json').write_bytes((root / 'sums/expert_cfg.json').read_bytes())
  names = sorted(tensors)
  for i in (0, 1):
    part = {name: tensors[name] for name in names[i::2]}
    safetensors.numpy.save_file(part, folder / f'part{i}.safetensors')
  return folder


DOWN = 'layers.1.mlp.experts.5.down_proj.weight'


@pytest.mark.parametrize(
  'edit, words',
  [
    (lambda t: None, ''),
    (lambda t: t.pop(DOWN), f"missing 'model.{DOWN}', too many none"),
    (
      lambda t: t.update({DOWN.replace('5', '6'): t[DOWN]}),
      "missing none, too many 'model.layers.1.mlp.experts.6.down_proj.weight'",
    ),
    (lambda t: t.update({DOWN: t[DOWN].T.copy()}), r'is F32\[8, 16\], where the model needs'),
    (lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}), r'is I32\[16, 8\]'),
    (lambda t: t.update({DOWN: t[DOWN] * np.nan}), 'numbers that are not finite'),
  ],
  ids=['whole', 'missing', 'more', 'shape', 'dtype', 'nan'],
)
def test_exactly_the_marked_tensors_are_taken(runs, tmp_path, edit, words):
  root, found = runs
  folder = changed(root, tmp_path, edit)
  cfg = tiny.make(**BASE)
  if not words:
    got = adapters.read(folder, cfg)[1]
    assert_equal(got, trainable.select(tiny.make(**BASE | SUMS), found['sums']['params']))
    return
  with pytest.raises(errors.InputError, match=words):
    adapters.read(folder, cfg)


def test_the_adapter_of_another_model_is_refused(runs):
  root, _ = runs
  model = dataclasses.replace(tiny.make(**BASE).model, num_layers=4)
  cfg = dataclasses.replace(tiny.make(**BASE), model=model)
  with pytest.raises(errors.InputError, match='every MoE layer of the model, 1 to 3'):
    adapters.read(root / 'sums', cfg)


def test_only_chosen_experts_are_extracted(runs, tmp_path):
  root, _ = runs
  with pytest.raises(errors.InputError, match="trainable.kind='all'; an adapter comes of a run"):
    adapters.extract(root / 'base', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_what_has_no_official_name_is_no_adapter():
  chosen = {'trainable__experts': ((0,),) * 3, 'model__num_dense_layers': 0}
  cfg = tiny.make(**ALL | chosen, model__attention__num_experts=2)
  assert 'attention' in model_variables.abstract_params(cfg.model)['moe_layers']
  with pytest.raises(errors.InputError, match='trained parameters have a name'):
    adapters.entries(cfg)
