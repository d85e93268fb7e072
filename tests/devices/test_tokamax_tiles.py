"""Tiles that were measured reach the kernels; tokamax's table and its rule of thumb serve the rest.

No kernel runs: programs are traced for a device of which only the description exists.
"""

import logging
import pathlib

import jax
import pytest

from experiments.bench import tune_tiles
from moe_jax import errors
from moe_jax.devices import hardware, tokamax_tiles
from moe_jax.models.experts import grouped_kernels
from moe_jax.planning import gpu_targets


class Hopper:
  """What tokamax asks of a default device; of a kind that no table knows."""

  device_kind = 'NVIDIA H100 of a test'
  platform = 'gpu'
  compute_capability = '9.0'
  core_count = 132


SHAPES = {'test': tune_tiles.Shapes(64, 128, 4, 64, 2, 2, 128, (192, 128))}


@pytest.fixture
def hopper(monkeypatch):
  monkeypatch.setattr(hardware, 'platform', lambda: 'gpu')
  tokamax_tiles.enter.cache_clear()
  with gpu_targets.as_default(Hopper()):
    yield
  tokamax_tiles.enter.cache_clear()


def found(products=('mosaic',), flash=()):
  """Name of a program -> the kernels that it calls."""
  return {
    name: tune_tiles.calls(fn, args)
    for name, fn, args in tune_tiles.programs(SHAPES, products, flash)
  }


def written(directory, bound, config, kind=Hopper.device_kind):
  """A file that knows one choice of tiles for one kernel."""
  import tokamax
  from tokamax._src.autotuning import autotuner

  times = tokamax.BenchmarkData(
    compile_time_ms=1.0, lower_time_ms=1.0, evaluation_times_ms=(1.0,), metadata={}
  )
  result = tokamax.AutotuningResult(kind, ((bound, autotuner.AutotuningData({config: times})),))
  path = tokamax_tiles.path_of(Hopper.device_kind, directory)
  path.write_text(result.dumps())
  return path


def test_a_file_per_kind_of_device():
  assert tokamax_tiles.path_of('NVIDIA H100 80GB HBM3', pathlib.Path('a')).name == (
    'nvidia_h100_80gb_hbm3.json'
  )
  assert tokamax_tiles.DIRECTORY.parent.name == 'configs'


def test_kernels_of_a_model_are_found_in_its_trace(hopper):
  made = found(flash=('mosaic_gpu',))
  assert len(made) == 7
  for name, bounds in made.items():
    kinds = sorted(type(b.op).__name__ for b in bounds)
    if 'attention' in name:
      base = 'PallasMosaicGpuFlashAttention'
      assert kinds == [base, f'{base}Vjp']
    else:
      assert kinds == ['PallasMosaicGpuRaggedDot']


def test_measured_tiles_are_taken_and_others_are_left_to_the_library(hopper, tmp_path):
  bounds = found()
  (bound,), (other,) = bounds['test gmm gate_up mosaic'], bounds['test gmm down mosaic']
  before = bound.default_config
  wanted = type(before)(block_m=128, block_n=64, block_k=64, num_stages=3, split_k=1)
  assert before not in (None, wanted)
  written(tmp_path, bound, wanted)
  assert tokamax_tiles.enter(Hopper.device_kind, tmp_path) == 1
  assert bound.default_config == wanted
  assert found()['test gmm gate_up mosaic'][0].default_config == wanted
  assert other.default_config == before


def test_without_a_file_it_says_so_once(hopper, tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    assert tokamax_tiles.enter(Hopper.device_kind, tmp_path) == 0
    assert tokamax_tiles.enter(Hopper.device_kind, tmp_path) == 0
  said = [r.getMessage() for r in caplog.records if 'no tiles were measured' in r.getMessage()]
  assert len(said) == 1 and 'experiments.bench.tune' in said[0]


def test_nothing_is_said_where_nothing_can_be_tuned(tmp_path, caplog):
  assert tokamax_tiles.enter('cpu', tmp_path) == 0
  assert not caplog.records


def test_a_file_that_cannot_be_read_or_is_of_another_device(hopper, tmp_path):
  path = tokamax_tiles.path_of(Hopper.device_kind, tmp_path)
  path.write_text('{"device_kind": 3}')
  with pytest.raises(errors.InputError, match=r'nvidia_h100_of_a_test\.json .*bench\.tune'):
    tokamax_tiles.enter(Hopper.device_kind, tmp_path)
  (bound,) = found()['test gmm gate_up mosaic']
  written(tmp_path, bound, bound.default_config, kind='NVIDIA B200')
  tokamax_tiles.enter.cache_clear()
  with pytest.raises(errors.InputError, match=r"'NVIDIA B200', not of 'NVIDIA H100 of a test'"):
    tokamax_tiles.enter(Hopper.device_kind, tmp_path)


# tokamax_products


def test_widths_that_mosaic_fails_on_are_left_to_triton(hopper):
  both = ('mosaic', 'triton')
  assert grouped_kernels._serving(both, (2048, 2048, 2816)) == both
  assert grouped_kernels._serving(both, (512, 512, 352)) == ('triton',)
  assert grouped_kernels._serving(('xla',), (5, 5, 6)) == ('xla',)
  assert grouped_kernels._serving(('mosaic',), (5, 5, 6)) == ('mosaic',)  # nothing else was allowed


def test_a_tokamax_without_triton_says_what_to_install(hopper, monkeypatch):
  from tokamax._src.ops.ragged_dot import api

  fewer = {k: v for k, v in api.IMPLEMENTATIONS.items() if k != 'triton'}
  monkeypatch.setattr(api, 'IMPLEMENTATIONS', fewer)
  with pytest.raises(errors.InputError, match=r'jax-triton .*moe_jax\[cuda\]'):
    grouped_kernels.tokamax_products(('mosaic', 'triton'), ('triton', 'mosaic'))
  grouped_kernels.tokamax_products(('mosaic',), ('mosaic',))


# The command


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path, monkeypatch):
  wanted = list(tune_tiles.programs(tune_tiles.TOY, ('xla',), ()))[:2]
  path = tokamax_tiles.path_of('cpu', tmp_path)
  kernels_of_cpu = jax.devices()[0].device_kind
  assert tune_tiles.measure(wanted[:1], path, 60) == (1, 0)
  assert tune_tiles.measure(wanted, path, 60) == (1, 0)
  assert tune_tiles.measure(wanted, path, 60) == (0, 0)
  other = list(tune_tiles.programs(tune_tiles.TOY, ('xla',), ()))[2:3]
  assert tune_tiles.measure(other, path, -1) == (0, 1)
  tokamax_tiles.enter.cache_clear()
  assert tokamax_tiles.enter(kernels_of_cpu, tmp_path) == 2
  tokamax_tiles.enter.cache_clear()
