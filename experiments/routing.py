"""What a trained run's routing would cost on D devices; also records it for router 'replay'.

python -m experiments.routing --workdir=runs/quickstart [--step=200] [--batches=8] \
  [--devices=8,16] [--limit=3] [--capacity_factor=1.0,1.25] [--save=assignments.npz] [--json]
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  flags.DEFINE_integer('batches', 8, 'training batches to record, from the first one on')
  flags.DEFINE_list('devices', None, "numbers of devices; the config's num_virtual_devices if none")
  flags.DEFINE_list('limit', ['3'], 'M: report the share of tokens that need more than M devices')
  flags.DEFINE_list('capacity_factor', ['1.0', '1.25'], 'rooms at which drops are counted')
  cli.path_flag('save', None, 'file for the assignments, .npz')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def _numbers(name: str, kind: type, minimum: float) -> list:
  """The values of a list flag.

  Raises:
    errors.InputError: one is no number, or out of range.
  """
  values = flags.FLAGS[name].value
  try:
    found = [kind(value) for value in values]
  except ValueError:
    found = []
  errors.require(
    bool(found) and all(minimum <= value < float('inf') for value in found),
    f'--{name}={",".join(values)} must be numbers of at least {minimum}, with commas in between',
  )
  return found


def main(unused_argv: Sequence[str]):
  """Prints a table per number of devices."""
  from moe_jax.analysis import assignments
  from moe_jax.runs import trained_run

  values, workdir = flags.FLAGS, cli.required('workdir')
  errors.require(values.batches >= 1, f'--batches={values.batches} must be at least 1')
  limits = _numbers('limit', int, 1)
  factors = _numbers('capacity_factor', float, 0.01)
  model = trained_run.read_config(workdir, values.step).model
  assignments.check(model)
  devices = [model.moe.num_virtual_devices]
  if values.devices is not None:
    devices = _numbers('devices', int, 1)
  for number in devices:
    assignments.check_devices(model.moe, number)
  path = pathlib.Path(values.save) if values.save else None
  if path:
    assignments.check_writable(path)
  loaded = trained_run.load(workdir, values.step)
  model = (
    loaded.cfg.model
  )  # another one, where an older step was taken because the newest is damaged
  if values.devices is None:
    devices = [model.moe.num_virtual_devices]
  corpus = trained_run.heldout_corpus(
    loaded, workdir, warn=lambda line: print(line, file=sys.stderr)
  )
  recording = assignments.collect(loaded, corpus, values.batches)
  found = {d: assignments.device_figures(recording, model, d, limits, factors) for d in devices}
  record = {'step': loaded.step, 'batches': values.batches, 'tokens': int(recording.mask.sum())}
  if path:
    assignments.save(path, recording)
    record['replay'] = assignments.replay_overrides(model, path, recording)
  if values.json:
    record['devices'] = {
      d: {key: value.tolist() for key, value in figures.items()} for d, figures in found.items()
    }
    json_output.show(record)
    return
  print(f'step={loaded.step}: {record["tokens"]:,} tokens of {values.batches} training batches')
  for number, figures in found.items():
    print(f'\n{number} virtual devices')
    print(assignments.table(figures, model.num_dense_layers))
  if path:
    overrides = ' '.join(f'--config.{key}={value}' for key, value in record['replay'].items())
    print(f'\nwrote {path}; row r of every training batch replays its row r with: {overrides}')
    if values.batches > 1:
      print('(rows past the batch size are never read; --batches=1 leaves them out)')


if __name__ == '__main__':
  cli.run(main, define_flags)
