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
  record = figures.as_dict(loaded.step)
  if flags.FLAGS.json:
    print(json.dumps(record))
    return
  print(
    f'step={loaded.step} loss={figures.loss:.4f} bits_per_byte={figures.bits_per_byte:.4f} '
    f'bytes={corpus.heldout.num_bytes:,}'
  )
  if figures.max_vio is not None:
    layers = ' '.join(f'{value:.2f}' for value in figures.max_vio_per_layer)
    print(f'max_vio_global={figures.max_vio:.2f} per MoE layer: {layers}')


if __name__ == '__main__':
  cli.run(main, define_flags)
