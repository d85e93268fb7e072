"""A checkpoint of any mesh goes on on any other: same state, same data, same losses."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax.checkpoints import checkpointer
from moe_jax.config import batch_sizes, parse, schema
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.runs import checks, train_run
from moe_jax.training import train_state
from tests.processes import launch

MAKE_MESH = partitioning.make_mesh
MESHES = {
  'one': {'data': 1},
  'eight': {'data': 8},
  'expert': {'data': 2, 'expert': 4},
  'fsdp': {'fsdp': 8},
  'zero1': {'data': 4, 'fsdp': 2, 'zero1': True},
  'tensor': {'data': 2, 'sequence': 2, 'tensor': 2},
  'stage': {'stage': 2, 'fsdp': 2},
}
SETTINGS = launch.SETTINGS | {
  'train.num_steps': 4,
  'checkpoint.save_every': 2,
  'model.attention.num_kv_heads': 2,
  'model.num_layers': 4,  # 3 of them with experts, which 2 stages share unequally
}
# Float32 sums over devices in another order, after two optimizer steps at a rate of 0.01.
RTOL = 2e-5

pytestmark = pytest.mark.slow


def make(cache: pathlib.Path, name: str) -> schema.Config:
  page = smoke.get_config()
  page.update_from_flattened_dict(SETTINGS | {'data.cache_dir': str(cache), 'mesh.data': 1})
  page.update_from_flattened_dict({f'mesh.{key}': value for key, value in MESHES[name].items()})
  return parse.from_dict(page.to_dict())


@pytest.fixture(autouse=True)
def as_many_devices_as_the_mesh_has(monkeypatch):
  def make_mesh(cfg):
    sizes = [getattr(cfg, name) for name in partitioning.MESH_AXES]
    return MAKE_MESH(cfg, jax.devices()[: int(np.prod(sizes))])

  monkeypatch.setattr(partitioning, 'make_mesh', make_mesh)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(name, cache) -> workdir of four steps on that mesh; each is trained once."""
  found = {}

  def train_on(name, cache):
    if name not in found:
      found[name] = tmp_path_factory.mktemp(name)
      train_run.run_training(make(cache, name), found[name], say=lambda line: None)
    return found[name]

  return train_on


def restored(workdir: pathlib.Path, cfg: schema.Config) -> checkpointer.Restored:
  mesh = partitioning.make_mesh(cfg.mesh)
  with checkpointer.Checkpointer(workdir / 'checkpoints', None, read_only=True) as reader:
    return reader.restore(train_state.abstract_state(cfg, mesh), step=2)


@pytest.mark.parametrize(
  'source, target',
  [
    ('eight', 'one'),
    ('one', 'eight'),
    ('expert', 'fsdp'),
    ('fsdp', 'expert'),
    ('zero1', 'tensor'),
    ('tensor', 'one'),
    ('one', 'stage'),
    ('stage', 'tensor'),
  ],
)
def test_a_checkpoint_goes_on_on_another_mesh(finished, cache, tmp_path, source, target):
  unbroken = finished(source, cache)
  workdir = pathlib.Path(shutil.copytree(unbroken, tmp_path / 'run'))
  shutil.rmtree(workdir / 'checkpoints' / '4')
  here, there = (restored(workdir, make(cache, name)) for name in (source, target))
  for a, b in zip(jax.tree.leaves(here.state), jax.tree.leaves(there.state), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  lines = []
  train_run.run_training(make(cache, target), workdir, say=lines.append)
  assert 'resuming after step 2 of 4' in lines
  assert any(line.startswith('placement changed: mesh.') for line in lines)
  got, want = (np.array(launch.figures(w)) for w in (workdir, unbroken))
  np.testing.assert_array_equal(got[:2], want[:2])
  np.testing.assert_allclose(got[2:], want[2:], rtol=RTOL)


def test_the_data_is_the_same_on_every_mesh(cache):
  """The parts of all devices, put together, are the batch of one device."""
  cfg = make(cache, 'eight')
  _, corpus = checks.prepare(make(cache, 'one'))
  length = cfg.model.max_seq_len
  options = dict(seed=0, max_seq_len=length, batch_sizes=batch_sizes.BatchSizes(8), num_steps=3)
  whole = pipeline.TrainBatches(corpus, **options)
  parts = [
    pipeline.TrainBatches(corpus, **options, shards=(i, 7 - i), num_shards=8) for i in range(4)
  ]
  for step in range(3):
    rows = {k: v for i, p in enumerate(parts) for k, v in zip((i, 7 - i), p[step]['tokens'])}
    np.testing.assert_array_equal(np.stack([rows[i] for i in range(8)]), whole[step]['tokens'])
