"""Every reader of a run that was trained with LoRA has the merged weights."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_jax.checkpoints import stream_reader, stream_writer
from moe_jax.config import parse
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.interop import huggingface, merged_leaves, source
from moe_jax.post_training import adapters, expert_config
from moe_jax.runs import first_state, run_record, trained_run
from moe_jax.training import lora
from tests import tiny
from tests.training import test_lora

SIZES = {'model__vocab_size': 300, 'data__tokenizer': 'bytes'}


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """(workdir, config, merged weights) of a run of which the last checkpoint is left."""
  workdir = tmp_path_factory.mktemp('lora') / 'run'
  cfg = tiny.make(**SIZES, **test_lora.LORA)
  params = test_lora.with_pairs(cfg)
  tokenizer = tokenizer_lib.byte_tokenizer(cfg.data.bos_token, cfg.data.eos_token)
  meta = {
    'config': parse.to_dict(cfg),
    'tokenizer': trained_run.digest(tokenizer),
    'data_fingerprint': 'text',
  }
  state = jax.device_get({'params': params, 'router_state': {}})
  with stream_writer.Writer(workdir / 'checkpoints', 7, state, meta) as writer:
    for name, leaf in source.by_name(state).items():
      writer.write(name, (), leaf)
  tokenizer.save(workdir / 'tokenizer.json')
  run_record.write(workdir, cfg, argv=[], data_fingerprint='text')
  return workdir, cfg, jax.device_get(lora.merged(params))


def assert_close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.device_get(got), want)


def test_slices_are_those_of_the_merged_weights(tuned):
  workdir, _, merged = tuned
  moe = merged['moe_layers']['moe']
  with stream_reader.Reader(workdir / 'checkpoints') as reader:
    for name, index, want in (
      ('params/moe_layers/moe/gate_up', (1, 3, slice(None), 1), moe['gate_up'][1, 3, :, 1]),
      ('params/moe_layers/moe/down', (0,), moe['down'][0]),
      ('params/head', (slice(None), slice(2, 5)), merged['head'][:, 2:5]),
      ('params/dense_layers/attention/o', (0,), merged['dense_layers']['attention']['o'][0]),
    ):
      got = merged_leaves.read(reader, name, index)
      assert got.dtype == want.dtype
      np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_a_loaded_run_and_one_that_starts_from_it_are_merged(tuned):
  workdir, cfg, merged = tuned
  loaded = trained_run.load(workdir)
  assert_close(loaded.variables['params'], merged)
  new = tiny.make(**SIZES, init_from=str(workdir))
  found = first_state.of_run(new).read(new, loaded.mesh, lambda line: None)
  assert_close(found['params'], merged)


@pytest.mark.slow
def test_an_export_is_merged(tuned, tmp_path):
  workdir, cfg, merged = tuned
  huggingface.export_checkpoint(workdir, tmp_path / 'hf', say=lambda line: None)
  values = tiny.values(**SIZES)
  assert_close(huggingface.load_variables(tmp_path / 'hf', values)[1]['params'], merged)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_merged_weights(tuned, tmp_path):
  workdir, _, merged = tuned
  (tmp_path / 'adapter').mkdir()
  chosen = expert_config.ExpertConfig({1: [], 2: [5]}, False, False)
  expert_config.write(tmp_path / 'adapter/expert_cfg.json', chosen)
  shapes = {'gate': (8, 16), 'up': (8, 16), 'down': (16, 8)}
  tensors = {
    f'model.layers.2.mlp.experts.5.{kind}_proj.weight': np.ones(shape, np.float32)
    for kind, shape in shapes.items()
  }
  safetensors.numpy.save_file(tensors, tmp_path / 'adapter/model.safetensors')
  adapters.merge(workdir, tmp_path / 'adapter', tmp_path / 'new', say=lambda line: None)
  want = jax.tree.map(np.array, merged)
  for name in ('gate_up', 'down'):
    want['moe_layers']['moe'][name][1, 5] = 1
  assert_close(trained_run.load(tmp_path / 'new').variables['params'], want)
