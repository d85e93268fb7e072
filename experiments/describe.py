"""Counts the parameters, FLOPs and cache of config pages, side by side, without building a model.

Run:  python -m experiments.describe --config=configs/deepseekmoe_16b.py
        --config=configs/deepseekmoe_16b.py:dense_7b [--json]
"""

import json
from collections.abc import Sequence

import jax
from absl import flags

from experiments.common import cli
from moe_jax import errors
from moe_jax.config import pages
from moe_jax.planning import describe


def define_flags():
  """Defines the command's flags."""
  flags.DEFINE_multi_string(
    'config', None, 'config page, path.py or path.py:variant; repeat it to compare'
  )
  flags.DEFINE_bool('json', False, 'print a JSON list, one object per config, and nothing else')


def main(argv: Sequence[str]):
  """Prints the comparison."""
  del argv
  specs = flags.FLAGS.config
  if not specs:
    raise errors.InputError(cli.MISSING_CONFIG)
  configs = [pages.read(spec) for spec in specs]
  # Shapes need no accelerator, and another process may be using it.
  jax.config.update('jax_platforms', 'cpu')
  descriptions = [describe.describe(config, spec) for config, spec in zip(configs, specs)]
  if flags.FLAGS.json:
    print(json.dumps([d.to_json() for d in descriptions], indent=2))
  else:
    print(describe.table(descriptions))


if __name__ == '__main__':
  cli.run(main, define_flags)
