"""Writes pairs of answers for DPO: a run's own wrong answers, each against a right one.

python -m experiments.make_pairs --workdir=runs/sft --out=runs/pairs.jsonl [--n=1024] \
  [--samples=4 --temperature=1.0] [--like=runs/sft]

The questions are training conversations of the run's own data (with --like those of another run);
held-out ones stay unseen. Each is answered --samples times; the first wrong answer that has ended
is rejected, and the first right one is chosen, or the answer of the data where none is right. OUT
is a file for data.source='preferences', written whole or not at all.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from moe_jax import errors


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run, or of a downloaded checkpoint', bucket=True)
  cli.path_flag('like', '', 'directory of the run whose questions are asked; its own without')
  cli.path_flag('out', '', 'JSON lines file that is written')
  flags.DEFINE_integer('n', 1024, 'questions at most')
  flags.DEFINE_integer('samples', 4, 'answers to each of them')
  flags.DEFINE_float('temperature', 1.0, 'of the samples')
  flags.DEFINE_integer('seed', 0, 'of the samples')
  flags.DEFINE_integer('max_new_tokens', 64, 'tokens of an answer at most')


def main(unused_argv: Sequence[str]):
  """Writes the pairs, and prints how many there are."""
  import tqdm

  from moe_jax import atomic_files
  from moe_jax.api import load
  from moe_jax.inference import sampling as sampling_lib
  from moe_jax.post_training import answers, pairs
  from moe_jax.runs import trained_run, working_directory
  from moe_jax.storage import fetch

  values, workdir = flags.FLAGS, cli.required('workdir')
  out = pathlib.Path(cli.required('out'))
  for name in ('n', 'samples', 'max_new_tokens'):
    errors.require(values[name].value > 0, f'--{name}={values[name].value} must be positive')
  errors.require(
    values.temperature > 0,
    f'--temperature={values.temperature} must be positive: all samples would be the same answer',
  )
  sampling = sampling_lib.Sampling(temperature=values.temperature, seed=values.seed)
  like = trained_run.read_config(values.like, flag='--like') if values.like else None
  asked = fetch.local(values.like or workdir, '--like' if values.like else '--workdir')
  loaded = load.load(workdir, flag='--workdir')
  data = working_directory.resolved(like or loaded.config, asked).data
  questions = answers.questions(data, values.n, heldout=False)
  found = pairs.sampled(
    loaded,
    questions,
    data,
    samples=values.samples,
    max_new_tokens=values.max_new_tokens,
    sampling=sampling,
  )
  done = list(tqdm.tqdm(found, 'answers', len(questions), unit='question', disable=None))
  rows = [one.row for one in done if one.row is not None]
  right, wrong = (sum(getattr(one, name) for one in done) for name in ('right', 'wrong'))
  errors.require(
    bool(rows),
    f'--workdir={workdir} has answered none of {len(done)} questions wrongly, so there is no pair; '
    'ask harder ones, raise --samples, or --max_new_tokens where answers do not end',
  )
  out.parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out, ''.join(json.dumps(row) + '\n' for row in rows))
  total = len(done) * values.samples
  print(
    f'{out}: {len(rows)} pairs from {len(done)} questions; of {total} samples {right} right, '
    f'{wrong} wrong, {total - right - wrong} without an end'
  )


if __name__ == '__main__':
  cli.run(main, define_flags)
