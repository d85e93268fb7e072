"""The command `plan`: GPUs from shapes, mistakes, and (slow) compilations for absent chips."""

import importlib.util

import pytest

from experiments import plan
from moe_jax import errors
from moe_jax.planning import compile_ahead, pipeline, planner
from tests import in_process

LITE = (
  '--config=configs/deepseek_v2_lite.py',
  '--config.train.batch_size=64',
  '--config.train.micro_batch_size=16',
  '--config.model.remat=full',
)
H200 = (*LITE, '--topology=h200:16', '--mesh=fsdp=16')
# As small as the TPU kernels allow.
SMALL = (
  '--config=configs/smoke.py',
  '--topology=v5e:2x2',
  *('--config.model.vocab_size=512', '--config.model.max_seq_len=256'),
  *('--config.model.embed_dim=256', '--config.model.num_layers=2', '--config.model.num_heads=2'),
  *('--config.model.attention.num_kv_heads=2', '--config.model.attention.head_dim=128'),
  *('--config.model.moe.num_experts=8', '--config.model.moe.num_experts_per_tok=2'),
  *('--config.model.moe.moe_mlp_dim=128', '--config.model.moe.num_shared_experts=1'),
  *('--config.model.dtype=bfloat16', '--config.train.batch_size=8'),
  '--mesh=fsdp=2,expert=2',
)


def test_json_has_the_stable_keys_first(capsys):
  found = in_process.run_json(capsys, plan, *H200)
  assert tuple(found)[: len(planner.STABLE_KEYS)] == (
    *('fits', 'hbm_bytes', 'hbm_capacity_bytes', 'breakdown', 'flops_per_device'),
    *('collective_bytes', 'step_seconds_bound', 'bound_by', 'mfu_bound'),
    *('compile_seconds', 'host_memory_bytes'),
  )
  assert found['fits'] and found['how'] == 'estimated from shapes'
  assert found['hbm_bytes'] == sum(found['breakdown'].values())
  assert found['collective_bytes'].keys() == {'fsdp'}
  assert found['bound_by'] in found['seconds']


def test_the_text_names_memory_times_and_traffic(capsys):
  in_process.run(plan, *H200)
  text = capsys.readouterr().out
  for words in (
    'estimated from shapes',
    'optimizer_state',
    'fits,',
    'MFU',
    'all-gather along fsdp',
  ):
    assert words in text


def test_what_does_not_fit_says_what_would(capsys):
  in_process.run(plan, *LITE, '--topology=h100:8', '--mesh=data=8')
  text = capsys.readouterr().out
  assert 'DOES NOT FIT' in text and 'would fit:\n  --mesh=' in text


def test_search(capsys):
  in_process.run(plan, *LITE, '--topology=h200:8', '--search', '--best=2')
  text, _, cost = capsys.readouterr().out.partition('\n\n')
  lines = text.splitlines()
  assert lines[0].startswith('best of ') and len(lines) == 4
  assert cost.startswith('COST of 1e+12 tokens on 8 chips, at ')


def test_cost_goodput_and_pipeline(capsys):
  stated = ('--tokens=5.7e12', '--chip_hour_price=2', '--mfu=0.3')
  failing = ('--mtbf_hours=50000', '--checkpoint_seconds=30', '--restart_seconds=300')
  found = in_process.run_json(capsys, plan, *H200, *stated, *failing, '--pipeline=2')['outlook']
  cost = found['cost']
  assert (cost['tokens'], cost['mfu'], cost['num_chips']) == (5.7e12, 0.3, 16)
  assert cost['money'] == 2 * cost['chip_hours']
  assert found['goodput']['mtbf_seconds'] == 50_000 * 3600 / 16
  assert [one['schedule'] for one in found['pipelines']] == [*pipeline.SCHEDULES]
  in_process.run(plan, *H200, *failing, '--pipeline=2')
  text = capsys.readouterr().out
  for words in ('COST of', 'GOODPUT, saving', 'PIPELINE of 2 stages', 'fits,'):
    assert words in text
  (first, second) = in_process.run_json(capsys, plan, *H200, '--search', '--best=2')
  assert first['outlook']['pipelines'] == [] and 'outlook' not in second


def test_decode(capsys):
  found = in_process.run_json(capsys, plan, *H200, '--decode', '--rows=64')
  assert found['breakdown']['caches'] == 4 * 4096 * 15_552 * 2  # rows, slots, numbers, bfloat16


@pytest.mark.parametrize(
  'arguments, words',
  [
    ((*LITE, '--topology=v5p:8x8'), '3 dimension'),
    ((*LITE, '--topology=h200:8', '--mesh=fdsp=8'), "did you mean 'fsdp'"),
    ((*LITE, '--topology=h200:8', '--mesh=fsdp=4'), 'multiply to 4'),
    ((*LITE, '--topology=h200:8', '--mesh=expert=3,fsdp=-1'), 'must divide'),
    ((*LITE, '--topology=h200:64', '--mesh=fsdp=64'), 'must be divisible by 64'),
    ((*H200, '--max_vio=-1'), 'must be a number and not negative'),
    ((*H200, '--max_vio=inf'), 'must be a number and not negative'),
    ((*H200, '--search', '--best=0'), '--best=0 must be at least 1'),
    ((*H200, '--decode', '--rows=-3'), '--rows=-3 must be a number of sequences'),
    ((*H200, '--decode', '--rows=24'), '--rows=24 must be divisible by 16, .* choose 16 or 32'),
    ((*H200, '--decode', '--rows=3', '--estimate'), '--rows=3 must be .* by 16, .* choose 16, or'),
    ((*H200, '--pipeline=-2'), '--pipeline=-2 must be a number of stages'),
    ((*H200, '--rows=4'), '--rows=4 has no effect without --decode'),
    ((*H200, '--best=4'), '--best=4 has no effect without --search'),
    ((*H200, '--restart_seconds=4'), '--restart_seconds=4.0 has no effect without --mtbf_hours'),
    ((*LITE, '--topology=h200:8', '--mesh=stage=2', '--search'), 'config.mesh.stage=2: a step in'),
    ((*H200, '--mfu=1.5'), "at most the plan's bound"),
    ((*H200, '--mtbf_hours=-1'), '--mtbf_hours=-1.0 must be'),
    ((*LITE, '--topology=h200:8', '--mesh=stage=2,data=4'), 'compare with --pipeline=STAGES'),
    ((*H200, '--pipeline=3'), '--pipeline=3 must be a power of two'),
    ((*H200, '--decode', '--pipeline=2'), 'are about training'),
    ((*H200, '--decode', '--search'), 'leave out --decode'),
    (LITE, '--topology is missing'),
  ],
)
def test_mistakes(arguments, words):
  with pytest.raises(errors.InputError, match=words):
    in_process.run(plan, *arguments)


def test_without_libtpu_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.InputError, match=r"pip install 'moe_jax\[tpu\]'"):
    in_process.run(plan, *SMALL)


needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason="needs the extra 'tpu'"
)


@pytest.mark.slow
@needs_libtpu
def test_a_real_compilation_is_cached_and_agrees_with_the_shapes(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  found = in_process.run_json(capsys, plan, *SMALL)
  assert found['how'] == 'compiled' and found['fits']
  assert found['compile_seconds'] > 1 and found['host_memory_bytes'] > 2**28
  assert found['hbm_bytes'] == sum(found['breakdown'].values())
  shapes = in_process.run_json(capsys, plan, *SMALL, '--estimate')
  for name in ('parameters', 'optimizer_state', 'batch'):
    assert found['breakdown'][name] == shapes['breakdown'][name]
  assert {'fsdp', 'expert'} <= {a for axes in found['collective_bytes'] for a in axes.split('+')}
  monkeypatch.setattr(compile_ahead, '_compile_apart', None)  # a second compilation would call it
  assert in_process.run_json(capsys, plan, *SMALL) == found


@pytest.mark.slow
@needs_libtpu
def test_a_step_of_decoding_compiles(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  found = in_process.run_json(capsys, plan, *SMALL, '--decode', '--rows=8')
  shapes = in_process.run_json(capsys, plan, *SMALL, '--decode', '--rows=8', '--estimate')
  assert found['how'] == 'compiled'
  assert found['breakdown']['caches'] == shapes['breakdown']['caches']
  assert found['breakdown']['parameters'] == shapes['breakdown']['parameters']


@pytest.mark.slow
@needs_libtpu
def test_a_program_that_is_too_large_is_reported(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path))
  in_process.run(plan, *SMALL, '--config.model.vocab_size=16777216')  # 52 GB per chip
  text = capsys.readouterr().out
  assert 'DOES NOT FIT' in text and 'would fit:' in text
