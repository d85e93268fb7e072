"""Takes a step again at which a run stopped, and names the first module that is not finite.

python -m experiments.replay_step --workdir=runs/quickstart [--step=120]

A run that stops because its steps are not finite leaves a dump in WORKDIR/nonfinite/STEP/.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.common import cli

SHOWN = 60  # characters of a row's text


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of the run that stopped')
  flags.DEFINE_integer('step', None, 'step of the dump; the latest one if not given')


def main(unused_argv: Sequence[str]) -> int:
  """Prints what is not finite; returns 1 if all is finite here."""
  from moe_jax.analysis import first_nonfinite
  from moe_jax.runs import nonfinite_dump

  workdir = pathlib.Path(cli.required('workdir'))
  dump = nonfinite_dump.read(workdir, flags.FLAGS.step)
  step, rows = dump.figures['step'], dump.figures['rows']
  print(
    f'step {step}, rows {rows[0]} to {rows[1]} of the row stream, from {workdir}/nonfinite/{step}'
  )
  again = first_nonfinite.replay(dump.cfg, dump.mesh, dump.state, dump.batch, step - 1)
  print(f'loss={again.loss} grad_norm={again.grad_norm}')
  if again.found is None:
    print(
      'all is finite here: what stopped the run does not follow from its weights and rows; suspect '
      'a device of that machine, or another version of the software'
    )
    return 1
  found = again.found
  print(f'first that is not finite: {found.kind} of {found.where}')
  text = nonfinite_dump.texts(workdir, dump, found.rows)
  for row in found.rows:
    print(f'  row {row} of the batch: {text[row][:SHOWN]!r}')
  return 0


if __name__ == '__main__':
  cli.run(main, define_flags)
