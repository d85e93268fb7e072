"""Commands that look at a trained run, in one process: evaluate --override, routing, leakage."""

import shutil

import jax
import numpy as np
import pytest

from configs import smoke
from experiments import evaluate, leakage, routing, routing_drift
from moe_jax import errors
from moe_jax.analysis import copying, interventions
from moe_jax.checkpoints import checkpointer
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.runs import train_run, trained_run
from tests import in_process
from tests.runs import damaged_step

MAKE_MESH = partitioning.make_mesh


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:1]))
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  page = smoke.get_config()
  values = {
    'data.cache_dir': str(tmp_path_factory.mktemp('cache')),
    'data.synthetic_documents': 100,
    'data.heldout_fraction': 0.2,
    'model.max_seq_len': 64,
    'model.num_layers': 2,
    'model.num_dense_layers': 1,
    'model.moe.dispatch': 'dense',
    'model.moe.num_shared_experts': 0,
    'optim.warmup_steps': 0,
    'train.num_steps': 25,
    'train.sample_prompt': '',
  }
  page.update_from_flattened_dict(values)
  workdir = tmp_path_factory.mktemp('run')
  train_run.run_training(parse.from_dict(page.to_dict()), workdir, say=lambda line: None)
  return workdir


def test_fewer_active_experts_cost_loss(workdir, capsys):
  here = f'--workdir={workdir}'
  plain = in_process.run_json(capsys, evaluate, here)
  assert 'overrides' not in plain
  fewer = '--override=model.moe.num_experts_per_tok=1'
  first, second = (in_process.run_json(capsys, evaluate, here, fewer) for _ in range(2))
  assert first == second and first['overrides'] == {'model.moe.num_experts_per_tok': 1}
  assert first['loss'] > plain['loss'] + 1e-3
  in_process.run(evaluate, here, fewer)
  out = capsys.readouterr().out
  assert out.startswith('step=25 model.moe.num_experts_per_tok=1 bits_per_byte=')


def test_what_a_text_costs_the_second_time(workdir, capsys, monkeypatch):
  here = f'--workdir={workdir}'
  found = in_process.run_json(capsys, evaluate, here, '--repeated')['repeated']
  one = trained_run.load(workdir)
  corpus = trained_run.heldout_corpus(one, workdir, warn=print)
  subject = interventions.Subject(one.cfg, one.variables, corpus, one.mesh)
  assert found == copying.measure(subject)._asdict()
  in_process.run(evaluate, here, '--repeated')
  said = f'said twice: loss={found["first"]:.4f}, and {found["second"]:.4f} the second time'
  assert said in capsys.readouterr().out
  monkeypatch.setattr(copying, 'measure', lambda subject: None)
  with pytest.raises(errors.InputError, match='document longer than 32 tokens, half a row'):
    in_process.run(evaluate, here, '--repeated')


def test_capacity_can_be_enforced_at_evaluation(workdir, capsys):
  given = {'policy': 'position', 'factor': '0.5', 'at_eval': 'true'}
  flags = [f'--override=model.moe.capacity.{key}={value}' for key, value in given.items()]
  plain, found = (
    in_process.run_json(capsys, evaluate, f'--workdir={workdir}', *f) for f in ([], flags)
  )
  # Room for half of the places of a row; at least half of the assignments have none.
  assert plain['routing']['drop_rate'] == 0 and found['routing']['drop_rate'] > 0.45
  assert found['loss'] > plain['loss']


@pytest.mark.parametrize(
  'command, arguments, message',
  [
    (evaluate, ['--override=model.moe.num_expert=3'], "did you mean 'num_experts'"),
    (evaluate, ['--override=model.moe.num_experts=4'], 'only settings that keep the weights'),
    (evaluate, ['--step=5'], 'step=5 is not among the checkpoints'),
    (evaluate, ['--infill=-3'], '--infill=-3 must be a number of gaps'),
    (evaluate, ['--limit=3'], '--limit=3 has no effect without --tasks; leave it out'),
    (evaluate, ['--batch_size=2'], '--batch_size=2 has no effect without --tasks'),
    (evaluate, ['--tasks=x', '--by_domain'], '--by_domain=True has no effect with --tasks'),
    (evaluate, ['--tasks=x', '--repeated'], '--repeated=True has no effect with --tasks'),
    (evaluate, ['--tasks=x', '--infill=3'], '--infill=3 has no effect with --tasks'),
    (routing, ['--devices=3,x'], '--devices=3,x must be numbers of at least 1'),
    (routing, ['--devices=16'], '--devices=16: .*choose a divisor of 8'),
    (routing, ['--capacity_factor=0'], '--capacity_factor=0 must be numbers'),
    (routing, ['--batches=0'], '--batches=0 must be at least 1'),
  ],
)
def test_bad_input_shows_before_anything_is_loaded(
  workdir, command, arguments, message, monkeypatch
):
  monkeypatch.setattr(
    checkpointer.Checkpointer, 'restore', lambda *unused, **more: pytest.fail('loaded')
  )
  with pytest.raises(errors.InputError, match=message):
    in_process.run(command, f'--workdir={workdir}', *arguments)


def test_routing_reports_and_records(workdir, capsys, tmp_path):
  flags = [f'--workdir={workdir}', '--batches=2', '--devices=2,8', '--limit=1,2']
  found = in_process.run_json(capsys, routing, *flags)
  assert found['step'] == 25 and found['tokens'] == 2 * 8 * 64
  assert list(found['devices']) == ['2', '8']
  eight = found['devices']['8']
  assert eight['devices_per_token'] == [3.0] and eight['over_2'] == [1.0]  # K = 3 experts
  assert 1 <= found['devices']['2']['straggler_factor'][0] <= 2
  assert set(eight) >= {'expert_drops_1', 'device_drops_1.25', 'least_load', 'most_load'}
  path = tmp_path / 'recording.npz'
  in_process.run(routing, *flags, f'--save={path}')
  out = capsys.readouterr().out
  assert '2 virtual devices' in out and 'straggler factor' in out
  assert f'--config.model.moe.options.replay_path={path}' in out
  assert '--config.model.moe.options.replay_rows=16' in out
  with np.load(path) as file:
    assert file['expert_idx'].shape == (1, 16, 64, 3)


def test_routing_of_an_older_step_is_counted_as_its_config_says(workdir, capsys, tmp_path):
  workdir = shutil.copytree(workdir, tmp_path / 'run')
  devices = trained_run.read_config(workdir).model.moe.num_virtual_devices
  damaged_step.add(workdir, {'model.moe.num_virtual_devices': 2 * devices})
  found = in_process.run_json(capsys, routing, f'--workdir={workdir}', '--batches=1')
  assert found['step'] == 25 and list(found['devices']) == [str(devices)]


def test_leakage_of_a_causal_router(workdir, capsys):
  found = in_process.run_json(capsys, leakage, f'--workdir={workdir}')
  assert found['changed'] == 0 and found['log_likelihood_change'] == 0
  assert found['theory'] is None and list(found['heldout_loss']) == ['as_trained']
  in_process.run(leakage, f'--workdir={workdir}')
  out = capsys.readouterr().out
  assert 'experts change for 0.00% of' in out and 'as trained' in out


@pytest.fixture(scope='module')
def tuned(workdir, tmp_path_factory):
  """Four more steps from the run's weights, two checkpoints of which are kept."""
  values = parse.to_dict(trained_run.read_config(workdir))
  values['init_from'] = str(workdir)
  values['train'] |= {'num_steps': 4, 'seed': 1}
  values['checkpoint'] |= {'save_every': 2, 'keep_last': 2}
  place = tmp_path_factory.mktemp('tuned')
  train_run.run_training(parse.from_dict(values), place, say=lambda line: None)
  return place


def test_routing_drifts_from_the_start_step_by_step(workdir, tuned, capsys):
  found = in_process.run_json(capsys, routing_drift, f'--workdir={tuned}')
  assert found['start'] == str(workdir) and set(found['steps']) == {'2', '4'}
  first, last = (np.mean(found['steps'][step]['experts_moved']) for step in ('2', '4'))
  assert 0 < first < last
  kept = [found['steps'][step]['kept_share'][0] for step in ('2', '4')]
  assert min(kept) > 2 / 8 and max(kept) < 1  # by chance two of eight
  assert (tuned / 'drift' / 'drift.png').is_file() and (tuned / 'drift' / 'drift.npz').is_file()
  in_process.run(routing_drift, f'--workdir={tuned}', '--step=4', '--text=start')
  out = capsys.readouterr().out
  assert 'held-out tokens (start text)' in out and 'layer 1: experts kept' in out


def test_drift_from_itself_is_none(tuned, capsys):
  found = in_process.run_json(capsys, routing_drift, f'--workdir={tuned}', f'--start={tuned}')
  assert found['steps']['4']['kept_share'] == [1.0]
  assert not np.any(found['steps']['4']['experts_moved']) and np.any(
    found['steps']['2']['experts_moved']
  )


def test_drift_of_a_run_without_a_start_is_refused(workdir):
  with pytest.raises(errors.InputError, match=r'random weights \(config.init_from is empty\)'):
    in_process.run(routing_drift, f'--workdir={workdir}')
