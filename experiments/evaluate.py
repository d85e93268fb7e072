"""Held-out loss, bits per byte and expert balance of a trained run.

python -m experiments.evaluate --workdir=runs/quickstart [--step=200] [--json]
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from moe_jax import evaluate, run


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run')
  flags.DEFINE_integer('step', None, 'checkpoint to evaluate; the newest whole one if not given')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def main(unused_argv: Sequence[str]):
  """Prints the figures of one checkpoint."""
  workdir = cli.required('workdir')
  loaded = run.load(workdir, flags.FLAGS.step)
  corpus = run.heldout_corpus(loaded, workdir, warn=lambda line: print(line, file=sys.stderr))
  figures = evaluate.evaluate(loaded.cfg, loaded.params, corpus, loaded.mesh, progress=True)
  if flags.FLAGS.json:
    print(json.dumps(figures.as_dict(loaded.step)))
  else:
    print(f'step={loaded.step} {figures} bytes={corpus.heldout.num_bytes:,}')


if __name__ == '__main__':
  cli.run(main, define_flags)
