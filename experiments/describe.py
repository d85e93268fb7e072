"""Counts the parameters, FLOPs and cache of config pages, side by side, without building a model.

Run:  python -m experiments.describe --config=configs/deepseekmoe_16b.py
        --config=configs/deepseekmoe_16b.py:dense_7b [--json]
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors


def define_flags():
  """Defines the command's flags."""
  cli.config_flag(repeated=True)
  flags.DEFINE_bool('json', False, 'print a JSON list, one object per config, and nothing else')


def main(argv: Sequence[str]):
  """Prints the comparison."""
  del argv
  import jax

  from moe_jax.planning import describe

  pages = flags.FLAGS.config
  errors.require(bool(pages), cli.MISSING_CONFIG)
  configs = [cli.resolve(page) for _, page in pages]
  # Shapes need no accelerator, and another process may be using it.
  jax.config.update('jax_platforms', 'cpu')
  descriptions = [describe.describe(cfg, spec) for cfg, (spec, _) in zip(configs, pages)]
  if flags.FLAGS.json:
    json_output.show([d.to_json() for d in descriptions], indent=2)
  else:
    print(describe.table(descriptions))


if __name__ == '__main__':
  cli.run(main, define_flags)
