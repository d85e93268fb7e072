"""Shows rows as a model is trained on them: what it learns, and in grey what it only reads.

python -m experiments.show_data --config=configs/sft.py --config.init_from=runs/base [--n=3]

A row is shown as text, with a line between its documents. Without a terminal, what is not learned
stands in brackets, [like this].
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli
from moe_jax import errors

if TYPE_CHECKING:
  import numpy as np

  from moe_jax import trees
  from moe_jax.data import tokenizer as tokenizer_lib

# Objectives whose runs make batches of something else than the rows of their data.
ELSEWHERE = {
  'policy': 'answers that it draws while it trains',
  'process_reward': 'the file objective.process_reward.labels',
}
GREY, PLAIN = '\x1b[90m', '\x1b[0m'


def define_flags():
  """Flags of this command."""
  cli.config_flag()
  flags.DEFINE_integer('n', 3, 'rows to show')
  flags.DEFINE_integer('start', 0, 'step whose batch is shown first')


def main(unused_argv: Sequence[str]):
  """Prints rows of the batches from `--start` on."""
  from moe_jax.data import corpus as corpus_lib
  from moe_jax.training import batches

  cfg, left = cli.resolve(flags.FLAGS.config), flags.FLAGS.n
  start = flags.FLAGS.start
  kind = cfg.objective.kind
  errors.require(
    kind not in ELSEWHERE,
    f'config.objective.kind={kind!r} learns from {ELSEWHERE.get(kind)}, not from rows of its data, '
    'which are what is shown here; show those of a page that trains on them, such as '
    'configs/sft.py',
  )
  errors.require(left > 0, f'--n={left} must be positive')
  errors.require(
    0 <= start < cfg.train.num_steps,
    f'--start={start} must be a step of the run, 0 to {cfg.train.num_steps - 1}',
  )
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed)
  rows = batches.of_run(cfg, corpus, start=start)
  for step, batch in enumerate(rows, start=start):
    for row in range(min(left, len(batch['tokens']))):
      one = {key: value[row] for key, value in batch.items()}
      print(f'--- step {step}, row {row}: {describe(one)}')
      print(render(one, corpus.tokenizer, grey=sys.stdout.isatty()))
      left -= 1
    if not left:
      return


def describe(row: 'trees.HostBatch') -> str:
  """What a row holds, in numbers."""
  learned, used = int((row['targets'] >= 0).sum()), int((row['segment_ids'] > 0).sum())
  return (
    f'{int(row["segment_ids"].max())} documents, {used} of {len(row["tokens"])} tokens, '
    f'{learned} learned'
  )


def render(row: 'trees.HostBatch', tokenizer: 'tokenizer_lib.Tokenizer', *, grey: bool) -> str:
  """A row as text; what is only read is grey, or in brackets."""
  before, behind = (GREY, PLAIN) if grey else ('[', ']')
  lines = []
  for segment in range(1, int(row['segment_ids'].max()) + 1):
    text = ''
    for learned, ids in runs(row, segment):
      words = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
      text += words if learned else f'{before}{words}{behind}'
    lines.append(text)
  return '\n'.join(lines)


def runs(row: 'trees.HostBatch', segment: int) -> 'list[tuple[bool, np.ndarray]]':
  """A document's ids in pieces that are learned as a whole, or not at all."""
  import numpy as np

  here = np.flatnonzero(row['segment_ids'] == segment)
  targets = row['targets'][here]
  # Each token but the first is the target of the one before it; the last target is no token here.
  inputs = row['tokens'][here]
  ids = np.append(inputs, targets[-1]) if targets[-1] >= 0 else inputs
  learned = np.concatenate([[False], targets >= 0])[: len(ids)]
  borders = np.flatnonzero(np.diff(learned)) + 1
  return [(bool(learned[part[0]]), ids[part]) for part in np.split(np.arange(len(ids)), borders)]


if __name__ == '__main__':
  cli.run(main, define_flags)
