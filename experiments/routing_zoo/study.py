"""Trains and evaluates each router with each seed, times them, and writes the table."""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

from configs import routing
from experiments.common import cli, local_jobs, step_rates
from experiments.routing_zoo import table
from moe_jax import atomic_files
from moe_jax.config import pages, schema
from moe_jax.runs import metric_log, run_record, train_run
from moe_jax.training import evaluate

# Without the ablations of gshard and the forced routers; --names takes any variant of the page.
NAMES = (
  *('deepseekmoe', 'deepseekmoe_norm', 'sigmoid', 'gshard', 'gshard_dropless', 'switch', 'hash'),
  *('hash_balanced', 'expert_choice', 'sinkhorn', 'device_limited_v2', 'group_limited_v3'),
  *('v3', 'loss_free', 'loss_free_softmax', 'loss_free_multiplicative', 'skywork', 'ds_moe'),
  'dense',
)


def main(unused_argv: Sequence[str]):
  """Trains, times, writes."""
  workdir, values = pathlib.Path(cli.required('workdir')), flags.FLAGS
  seeds, names = local_jobs.seeds(values.seeds), values.names or NAMES
  configs = {(name, seed): _config(name, seed) for seed in seeds for name in names}
  for key, cfg in configs.items():  # results of other settings are not those that were asked for
    where = _result_path(workdir, *key).parent
    if (where / 'config.json').exists():
      run_record.check_workdir(where, cfg, allow_change=False, allow_longer=False)
  pending = [key for key in configs if not _result_path(workdir, *key).exists()]

  def train(key):
    return _train(configs[key], _result_path(workdir, *key))

  local_jobs.run('experiments.routing_zoo', pending, train)
  if local_jobs.is_shard():
    return
  results = {
    f'{name}/{seed}': json.loads(_result_path(workdir, name, seed).read_text())
    for name, seed in configs
  }
  rates = step_rates.tokens_per_second({name: configs[name, seeds[0]] for name in names})
  written = table.write(pathlib.Path(values.out), routing.SUMMARY, configs, results, rates)
  print('wrote: ' + ' '.join(str(path) for path in written))


def _config(name: str, seed: int) -> schema.Config:
  values = pages.values(f'configs/routing.py:{name}')
  values.train.seed = seed
  values.train.num_steps = flags.FLAGS.steps or values.train.num_steps
  return cli.resolve(values)


def _result_path(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  return workdir / name / str(seed) / 'result.json'


def _train(cfg: schema.Config, path: pathlib.Path):
  """Trains and evaluates one run and writes its figures to `path`."""
  trained, corpus = train_run.run_training(cfg, path.parent, argv=sys.argv, say=lambda line: None)
  if trained.interrupted_by:
    raise KeyboardInterrupt
  figures = evaluate.evaluate(cfg, trained.variables, corpus, trained.mesh)
  lines = metric_log.read_metrics(path.parent)
  drop_rate = metric_log.tail_mean(lines, 'drop_rate', cfg.train.num_steps)
  result = {**figures.as_dict(trained.step), 'train_drop_rate': drop_rate}
  atomic_files.write_text(path, json.dumps(result, indent=2) + '\n')
  print(f'{path.parent}: {figures}', flush=True)
  jax.clear_caches()  # dozens of compiled models would fill the memory
