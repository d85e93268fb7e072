"""A run of a tiny model on one device, which the tests here tune."""

import jax
import pytest

import moe_jax
from moe_jax.devices import partitioning

MAKE_MESH = partitioning.make_mesh
SIZES = {
  'mesh.data': 1,
  'train.batch_size': 4,
  'train.log_every': 1,
  'train.eval_every': 0,
  'checkpoint.save_every': 2,
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A run to start from."""
  root = tmp_path_factory.mktemp('base')
  changes = {
    'data.cache_dir': str(root / 'cache'),
    'data.synthetic_documents': 60,
    'model.num_layers': 2,
    'model.moe.expert_bias.update_rule': 'sign',
    'train.num_steps': 2,
    'optim.warmup_steps': 0,
    'train.sample_prompt': '',
  }
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, one))
    yield moe_jax.train('smoke', root / 'run', report=False, say=print, **SIZES | changes)
