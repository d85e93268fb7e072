"""Held-out loss, bits per byte and expert balance of a trained run.

python -m experiments.evaluate --workdir=runs/quickstart [--step=200] [--json] \
  [--override=model.moe.num_experts_per_tok=3 ...]
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from moe_jax import evaluate, overrides, run


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run')
  flags.DEFINE_integer('step', None, 'checkpoint to evaluate; the newest whole one if not given')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')
  flags.DEFINE_multi_string(
    'override', [], 'KEY=VALUE: a setting of the model that keeps its weights; repeat it for more'
  )


def main(unused_argv: Sequence[str]):
  """Prints the figures of one checkpoint."""
  workdir, step = cli.required('workdir'), flags.FLAGS.step
  cfg = run.read_config(workdir, step)
  values = overrides.parse(cfg, flags.FLAGS.override)
  overrides.changed(cfg, values)  # mistakes show before anything is loaded
  loaded = overrides.apply(run.load(workdir, step), values)
  corpus = run.heldout_corpus(loaded, workdir, warn=lambda line: print(line, file=sys.stderr))
  figures = evaluate.evaluate(loaded.cfg, loaded.variables, corpus, loaded.mesh, progress=True)
  if flags.FLAGS.json:
    print(json.dumps(figures.as_dict(loaded.step) | ({'overrides': values} if values else {})))
    return
  under = ''.join(f' {key}={value}' for key, value in values.items())
  print(f'step={loaded.step}{under} {figures} bytes={corpus.heldout.num_bytes:,}')


if __name__ == '__main__':
  cli.run(main, define_flags)
