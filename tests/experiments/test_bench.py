"""The benchmark's harness, report and command, and the layer suite at toy size."""

import dataclasses
import importlib.util
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as command
from experiments.bench import layer, report
from experiments.common import harness
from moe_jax import errors
from tests import in_process

TOY = layer.Case(64, 16, 8, 8, 2, 1)
PEAKS = harness.Peaks(flops=1e9, bytes=1e9)


@pytest.fixture
def toy(monkeypatch, tmp_path):
  monkeypatch.setattr(layer, 'CASES', (TOY,))
  monkeypatch.setattr(harness, 'measure_peaks', lambda: PEAKS)
  return tmp_path / 'results'


def sleeper(seconds, **fields):
  return harness.Program('sleep', run=lambda i: time.sleep(seconds), **fields)


def test_ratios_are_those_of_the_programs_of_one_name():
  programs = [
    sleeper(0.02, variant='ours', flops=1e7, bytes=1e6),
    sleeper(0.01, variant='twin', role='dense'),
    sleeper(0.04, variant='theirs', role='transformers'),
    harness.Program('another', 'alone', lambda i: None),
  ]
  ours, twin, theirs, alone = harness.measure('suite', programs, 3, PEAKS)
  assert ours.repeats == 3 and ours.seconds_min <= ours.seconds_median <= ours.seconds_max
  # Sleeping takes at least as long as was asked for, and on a busy machine longer.
  assert ours.ratio_to_dense > 1.0 and twin.ratio_to_dense == 1.0
  assert ours.ratio_to_transformers > 1.0 and theirs.ratio_to_transformers == 1.0
  assert 0 < ours.ratio_to_peak <= 0.5  # 10 ms of products in 20 ms
  assert alone.ratio_to_dense is alone.ratio_to_transformers is alone.ratio_to_peak is None


def test_rounds_run_every_program_once_after_a_warm_up():
  calls = {'a': [], 'b': []}
  programs = [harness.Program('one', name, seen.append) for name, seen in calls.items()]
  harness.measure('suite', programs, 4, PEAKS)
  assert calls == {'a': [0, 1, 2, 3, 4], 'b': [0, 1, 2, 3, 4]}


@pytest.mark.slow  # measures for seconds
def test_peaks_are_measured_here():
  peaks = harness.measure_peaks(repeats=1)
  assert 1e8 < peaks.flops < 1e14 and 1e7 < peaks.bytes < 1e13
  assert peaks.bound(peaks.flops, 0) == pytest.approx(1.0)
  assert peaks.bound(0, 2 * peaks.bytes) == pytest.approx(2.0)


@pytest.mark.slow
def test_command_measures_prints_and_keeps_what_it_did_not_measure(toy, capsys):
  arguments = ('--suite=layer', '--repeats=1', f'--out={toy}', '--notransformers')
  results = in_process.run_json(capsys, command, *arguments)
  assert all(tuple(r) == harness.FIELDS for r in results)
  variants = [(r['name'].split()[-1], r['variant']) for r in results]
  assert variants == [
    (name, variant)
    for name in ('forward', 'forward+backward')
    for variant in ('dropless', 'capacity', 'dense', 'dense twin', 'plain JAX')
  ]
  assert all(r['ratio_to_dense'] > 0 and r['peak_bytes'] > 0 for r in results)
  capsys.readouterr()
  in_process.run(command, *arguments, '--only=dropless,backward')
  printed = capsys.readouterr().out
  assert (
    printed.count('\n') == 5 and 'capacity' not in printed
  )  # three programs, the header's lines
  saved = json.loads((toy / 'layer_cpu.json').read_text())
  assert len(saved) == len(results)
  assert saved[0]['run']['versions']['jax'] and saved[0]['run']['peaks']['flops'] == 1e9
  text = (toy / 'layer_cpu.md').read_text()
  assert text.count('| dropless |') == 2 and text.count('| capacity |') == 2
  assert (toy / 'layer_cpu.png').stat().st_size > 1000


@pytest.mark.parametrize(
  'arguments, words',
  [
    (('--suite=layer', '--repeats=0'), '--repeats=0'),
    (('--suite=layer', '--platform=gpu'), '--platform=gpu'),
    (('--suite=layer', '--only=nothing'), '--only=nothing'),
    ((), '--suite'),
  ],
)
def test_command_names_what_is_wrong(toy, arguments, words):
  with pytest.raises(errors.InputError, match=words):
    in_process.run(command, *arguments, f'--out={toy}')
  assert not toy.exists()


def test_broken_results_are_refused_before_they_are_replaced(tmp_path):
  path = tmp_path / 'layer_cpu.json'
  path.write_text('[{"suite": 1}]')
  with pytest.raises(errors.InputError, match='layer_cpu.json'):
    report.write(tmp_path, 'layer_cpu', {}, [])
  assert path.read_text() == '[{"suite": 1}]'


def test_layer_and_twin_have_equal_activated_products():
  """FLOPs of the twin's two products by hand; the layer's, K + shared experts per token."""
  case = dataclasses.replace(TOY, experts=4)
  _, twin = layer.make_twin(case)
  num_weights = sum(a.size for a in twin['params'].values())
  assert case.flops(backward=False) == 2 * case.tokens * num_weights
  _, variables = layer.make_moe(case, 'dropless')
  shared = sum(a.size for a in variables['params']['shared'].values())
  expert = sum(variables['params'][name].size for name in ('gate_up', 'down')) // case.experts
  assert num_weights == shared + case.top_k * expert


@pytest.mark.parametrize('dispatch', [pytest.param('dropless', marks=pytest.mark.slow), 'dense'])
def test_layer_programs_compute_the_layer(dispatch):
  xs = layer.inputs(TOY)
  assert len({float(x[0, 0, 0]) for x in xs}) == len(xs)  # fresh inputs
  fn, variables = layer.make_moe(TOY, dispatch)
  ours = layer.program(TOY, dispatch, False, fn, variables, xs)
  np.testing.assert_allclose(ours.run(1), fn(variables, xs[1]), rtol=1e-4, atol=1e-6)
  grads = layer.program(TOY, dispatch, True, fn, variables, xs).run(1)
  assert jnp.abs(grads[0]['gate_up']).max() > 0 and grads[1].shape == xs[1].shape


def test_transformers_layer_computes_the_same():
  if not importlib.util.find_spec('torch') or not importlib.util.find_spec('transformers'):
    pytest.skip("needs the extra 'hf'")
  xs = layer.inputs(TOY)
  fn, variables = layer.make_moe(TOY, 'dropless')
  theirs = layer.torch_program(TOY, variables, xs, False).run(1)
  np.testing.assert_allclose(fn(variables, xs[1]), theirs, rtol=2e-4, atol=1e-6)
