"""The GPU script at toy sizes: every part runs, results are on disk at once, time is kept."""

import dataclasses
import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import gpu_checks, gpu_kernels, gpu_parts, gpu_sizes
from experiments.common import harness

PEAKS = harness.Peaks(flops=1e12, bytes=1e11)
PART_OF = {  # part -> names that its results begin with
  'checks': ('legs', 'layer', 'attention', 'head loss'),
  'layer': ('layer forward', 'layer fwd + bwd'),
  'cache': ('MLA cache',),
  'step': ('tiny step',),
  'attention': ('attention forward', 'attention fwd + bwd'),
  'legs': ('gmm gate_up', 'gmm_t gate_up', 'tgmm gate_up', 'gmm down', 'gmm_t down', 'tgmm down'),
  'dispatch': ('plan', 'gather', 'combine'),
  'head_loss': ('head loss',),
  'generation': ('generation',),
  'layer_profile': ('layer fwd + bwd',),
}
if importlib.util.find_spec('experiments.bench.decode'):
  PART_OF['decode_suite'] = ()


MODELS = ('step', 'generation')  # whole ones, which take long to compile


@pytest.fixture(scope='module')
def journal(tmp_path_factory):
  path = tmp_path_factory.mktemp('gpu') / 'toy.json'
  made = gpu_parts.Journal(path, {'environment': {}})
  assert gpu_parts.run(gpu_sizes.TOY, made, 600, sorted(set(PART_OF) - set(MODELS)), peaks=PEAKS)
  return json.loads(path.read_text())['results']


def check_parts(results, parts):
  for part in parts:
    names = [r['name'] for r in results if r['part'] == part]
    for begin in PART_OF[part]:
      assert any(name.startswith(begin) for name in names), (part, begin)
  assert not [r for r in results if 'failed' in r or 'skipped' in r]


@pytest.mark.slow
def test_parts_run_and_are_written_down(journal):
  assert set(PART_OF) >= set(gpu_parts.PARTS) - {'decode_suite'}
  check_parts(journal, set(PART_OF) - set(MODELS))


@pytest.mark.slow
def test_parts_with_whole_models_run(tmp_path):
  made = gpu_parts.Journal(tmp_path / 'toy.json', {})
  assert gpu_parts.run(gpu_sizes.TOY, made, 600, MODELS, peaks=PEAKS)
  check_parts(made.results, MODELS)


@pytest.mark.slow
def test_results_have_the_fields_of_all_suites(journal):
  timed = [r for r in journal if r.get('suite')]
  assert len(timed) > 25
  for result in timed:
    assert set(harness.FIELDS) <= set(result)
    assert 0 < result['seconds_min'] <= result['seconds_median'] <= result['seconds_max']
  experts = [r for r in timed if r['name'] == 'layer fwd + bwd']
  assert {'balanced', 'empty', 'dense'} <= {r['variant'] for r in experts}
  assert all(r['ratio_to_dense'] > 0 for r in experts)


@pytest.mark.slow
def test_checks_find_a_wrong_kernel(journal):
  checks = [r for r in journal if r['part'] == 'checks']
  assert len(checks) > 10 and all(r['passed'] for r in checks)
  good = np.ones(3)
  assert gpu_checks.verdict('a', good + 1e-3, good, 2**-7)['passed']
  assert not gpu_checks.verdict('a', good + 1e-2, good, 2**-7)['passed']
  assert not gpu_checks.verdict('a', good * np.nan, good, 2**-7)['passed']


def test_time_is_kept_and_failures_do_not_stop_the_rest(monkeypatch, tmp_path):
  def fails(sizes, peaks):
    yield {'name': 'before'}
    raise NotImplementedError('no such kernel')

  def works(sizes, peaks):
    yield {'name': 'after'}

  parts = {'long': (100, works), 'bad': (1, fails), 'good': (1, works)}
  monkeypatch.setattr(gpu_parts, 'PARTS', parts)
  journal = gpu_parts.Journal(tmp_path / 'a' / 'b.json', {})
  assert not gpu_parts.run(
    dataclasses.replace(gpu_sizes.TOY, patience=1.0), journal, 50, peaks=PEAKS
  )
  results = json.loads((tmp_path / 'a' / 'b.json').read_text())['results'][1:-1]
  assert [r.get('name') for r in results] == [None, 'before', None, 'after']
  assert 'may take 100' in results[0]['skipped']
  assert results[2]['failed'] == 'NotImplementedError: no such kernel'


def test_a_program_that_cannot_be_made_is_a_result():
  def wrong(x):
    raise NotImplementedError('too narrow')

  made = gpu_kernels.prepare('gmm', 'mosaic', wrong, [(jnp.zeros(2),)], gpu_sizes.TOY)
  good = gpu_kernels.prepare('gmm', 'xla', jnp.sin, [(jnp.zeros(2),)], gpu_sizes.TOY)
  bad, timed = gpu_kernels.measured([made, good], gpu_sizes.TOY, PEAKS)
  assert bad['failed'] == 'NotImplementedError: too narrow' and 'mosaic' in bad['name']
  assert timed['variant'] == 'xla'


@pytest.mark.parametrize('case', ['balanced', 'zipf', 'hot', 'empty'])
def test_routing(case):
  idx = gpu_sizes.routing(case, 6400, 64, 6)
  load = np.bincount(idx.reshape(-1), minlength=64) / 600  # of the mean
  assert idx.shape == (6400, 6) and idx.dtype == np.int32 and idx.max() < 64
  if case == 'balanced':
    assert (load == 1).all()
  if case == 'hot':
    assert 0.29 < load[0] / 64 < 0.33  # and a 64th of the others' choices
  if case == 'empty':
    assert not load[:16].any() and load[16:].min() > 1
  if case == 'zipf':
    assert 2.5 < load[0] < 5 and 0.4 < load[63] < 0.9
  if case != 'hot':
    assert (np.diff(np.sort(idx, axis=1)) > 0).all()  # an expert once per token
