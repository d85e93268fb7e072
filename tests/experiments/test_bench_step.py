import dataclasses
import io
import json

import jax
import pytest

from configs import base, quickstart, recipes
from experiments.bench import (
  compile,
  compile_case,
  scale,
  step,
  step_server,
  torch_step,
  torch_threads,
  twins,
)
from experiments.common import harness, stepper
from moe_jax import errors
from moe_jax.config import parse, rules
from moe_jax.devices import partitioning
from moe_jax.models import model_variables, transformer
from moe_jax.planning import flops, host_memory
from moe_jax.training import cross_entropy
from tests import tiny

PEAKS = harness.Peaks(flops=1e11, bytes=1e10)
ONCE = harness.Options(repeats=1, transformers=False)


def page():
  """The tiny config of the tests as a page."""
  values = base.get_config()
  one_layer = {'model.num_layers': 1, 'model.num_dense_layers': 0}  # half the time to compile
  values.update_from_flattened_dict(tiny.SIZES | one_layer | {'mesh.data': 1})
  return values


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """The mesh of a page would take all eight."""
  make = partitioning.make_mesh
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg: make(cfg, jax.devices()[:1]))


def test_the_twin_has_the_flops_that_are_activated():
  cfg = parse.from_dict(quickstart.get_config().to_dict())
  twin = twins.dense_twin(cfg)
  assert twin.model.mlp_dim == 8 * 64 and not twin.model.is_moe
  # Per token and layer the router alone costs 6 D E more.
  router = 6 * 128 * 63 * 3
  ours, theirs = (flops.train_flops_per_token(c.model) for c in (cfg, twin))
  assert ours - theirs == router
  assert twin.model.num_layers == cfg.model.num_layers and twin.train == cfg.train


def test_a_twin_with_dense_layers_has_the_mean_width():
  cfg = tiny.make()  # 1 layer of 24, 2 of (1 + 2) x 8
  assert twins.dense_twin(cfg).model.mlp_dim == 24
  wider = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mlp_dim=60))
  assert twins.dense_twin(wider).model.mlp_dim == (60 + 2 * 24) / 3


def test_a_dense_model_has_no_twin():
  with pytest.raises(errors.InputError, match='no dense twin'):
    twins.dense_twin(twins.dense_twin(tiny.make()))


@pytest.mark.slow
def test_step_suite_at_toy_size():
  cases = [step.Case('toy', page, steps=2), step.Case('other', page)]
  options = dataclasses.replace(ONCE, only=('toy',))
  ours, dense = step.run(options, PEAKS, cases)
  assert (ours.variant, dense.variant) == ('dropless', 'dense twin')
  assert ours.name == dense.name == 'toy, 8 x 16 tokens'
  assert dense.ratio_to_dense == 1 and ours.ratio_to_dense > 0 and ours.peak_bytes > 0
  detail = ours.detail
  assert detail['tokens_per_second'] == pytest.approx(8 * 16 / ours.seconds_median)
  cfg = parse.from_dict(page().to_dict())
  rate = 8 * flops.train_flops_per_sequence(cfg.model) / ours.seconds_median
  assert detail['mfu'] == pytest.approx(rate / PEAKS.flops)
  shares = {k: v for k, v in detail.items() if k not in ('tokens_per_second', 'mfu')}
  assert sum(shares.values()) == pytest.approx(1)
  assert {'attention', 'router', 'dispatch', 'experts', 'loss', 'optimizer'} <= set(shares)
  assert 'experts' not in dense.detail and dense.detail['dense_ffn'] > 0


def test_a_case_elsewhere_is_left_out():
  assert step.run(ONCE, PEAKS, [step.Case('toy', page, platforms=('gpu',))]) == []


def test_every_case_is_a_legal_config_with_a_twin():
  for case in step.CASES:
    cfg = parse.from_dict(case.page().to_dict())
    twin = twins.dense_twin(cfg)
    ours, dense = (flops.train_flops_per_token(c.model) for c in (cfg, twin))
    assert dense < ours < 1.07 * dense  # the router, and rounding
    for dispatch in case.dispatches:
      rules.validate(step._with_dispatch(cfg, dispatch))


def test_transformers_starts_from_the_same_loss(monkeypatch):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  values = step.tiny_mla()
  sizes = {'vocab_size': 64, 'max_seq_len': 16, 'num_layers': 1}
  values.update_from_flattened_dict({f'model.{name}': size for name, size in sizes.items()})
  recipes.experts(values, shared=1, routed=8, per_tok=2, width=16)
  values.train.batch_size = 2
  cfg = parse.from_dict(values.to_dict())
  params = partitioning.unbox(model_variables.init(cfg.model, jax.random.key(cfg.train.seed)))
  rows = stepper.rows(cfg, 0)
  ids = rows['tokens'], rows['positions'], rows['segment_ids']
  logits = tiny.jit(transformer.Transformer(cfg.model).apply)(params, *ids).logits
  ours = cross_entropy.next_token(logits, rows['targets'])[0] / (rows['targets'] >= 0).sum()
  losses_seen = []
  monkeypatch.setattr(torch_threads, 'use_best', lambda run: losses_seen.append(run(0)))
  run = torch_step.make_step(cfg)
  assert losses_seen[0] == pytest.approx(float(ours), rel=1e-5)  # float32 sums in another order
  assert run(0) < losses_seen[0]  # it has learnt from the batch


def test_compile_is_measured_without_the_cache(monkeypatch):
  calls = iter([0, 1000])
  monkeypatch.setattr(host_memory, 'peak', lambda: next(calls))
  monkeypatch.setattr(jax, 'clear_caches', lambda: None)  # the other tests would compile anew
  before = jax.config.jax_enable_compilation_cache
  cfg = tiny.make(mesh__data=1, model__num_layers=1, model__moe__num_experts=0)
  found = compile_case.measure(cfg, cfg)
  assert found['trace_seconds'] > 0 and found['compile_seconds'] > 0 and found['host_bytes'] == 1000
  assert jax.config.jax_enable_compilation_cache == before


def test_compile_suite_compares_with_the_first_case(monkeypatch):
  cost = {6: 2.0, 60: 3.0}

  def run(case):
    return {
      'trace_seconds': cost[case.layers],
      'compile_seconds': 1.0,
      'host_bytes': 2**20,
    }

  monkeypatch.setattr(compile, '_in_process', run)
  options = dataclasses.replace(ONCE, only=('depth, 63', 'layers'))
  cases = [c for c in compile.CASES if c.layers in cost]
  found = compile.run(options, PEAKS, cases)
  assert [r.variant for r in found] == ['6 layers', '60 layers']
  assert [r.detail['of 6 layers'] for r in found] == [1.0, 4 / 3]
  assert found[1].seconds_median == 4 and found[1].detail['host_MiB'] == 1


def test_compile_cases_differ_in_what_they_say():
  for case in compile.CASES:
    model = case.config(case.layers).model
    assert model.num_layers == case.layers and model.is_moe != case.dense
    assert case.dense or model.moe.num_experts == case.experts


@pytest.mark.slow
def test_first_step_is_seen(tmp_path):
  arguments = ['--config.data.synthetic_documents=120', '--config.data.heldout_fraction=0.2']
  assert 0 < compile.first_step('configs/smoke.py', tmp_path, arguments) < 300


@pytest.mark.slow
def test_scale_suite_at_toy_size(monkeypatch):
  monkeypatch.setattr(scale, 'page', lambda **overrides: _toy(overrides))
  monkeypatch.setattr(scale, 'EXPERTS', (4, 8))
  few, many, dense = scale.run(dataclasses.replace(ONCE, only=('top-6',)), PEAKS)
  assert [r.variant for r in (few, many, dense)] == ['4 experts', '8 experts', 'dense twin']
  ratio = many.seconds_median / few.seconds_median
  assert many.detail['of 4 experts'] == pytest.approx(ratio) and many.ratio_to_dense > 0
  assert 'of 4 experts' not in few.detail and many.detail['parameters'] > few.detail['parameters']


def _toy(overrides):
  values = page()
  values.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  values.train.batch_size, values.model.max_seq_len = 2, 16
  return values


def test_attention_alone(monkeypatch):
  monkeypatch.setattr(scale, 'ATTENTION_LENGTHS', {'cpu': (32,)})
  (found,) = scale.run(dataclasses.replace(ONCE, only=('attention',)), PEAKS)
  assert found.variant == 'reference' and found.ratio_to_peak > 0


def test_a_server_answers_every_step(monkeypatch, capsys):
  values = parse.to_dict(parse.from_dict(_toy({}).to_dict()))
  monkeypatch.setattr(step_server.compile_cache, 'enable', lambda root: None)
  monkeypatch.setattr(step_server.sys, 'stdin', io.StringIO(json.dumps(values) + '\n0\n1\n'))
  step_server.main()
  said = capsys.readouterr().out.split()
  assert int(said[0]) > 0 and said[1:] == ['done', 'done']
