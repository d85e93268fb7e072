"""What a trained run's routing tells the past about the future: nothing, unless experts choose.

python -m experiments.leakage --workdir=runs/expert_choice [--step=200] [--json]
"""

import math
import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, json_output

_LOSS_NAMES = {'as_trained': 'as trained', 'shuffled': 'with tokens dealt to chunks at random'}


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run')
  flags.DEFINE_integer('step', None, 'checkpoint to probe; the newest whole one if not given')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def main(unused_argv: Sequence[str]):
  """Prints what changes in the first halves of rows when their second halves are exchanged."""
  from moe_jax.analysis import assignments, leakage_probe
  from moe_jax.runs import trained_run

  workdir, step = cli.required('workdir'), flags.FLAGS.step
  assignments.check(trained_run.read_config(workdir, step).model)
  loaded = trained_run.load(workdir, step)
  corpus = trained_run.heldout_corpus(
    loaded, workdir, warn=lambda line: print(line, file=sys.stderr)
  )
  found = leakage_probe.probe(loaded, corpus)
  theory = leakage_probe.theory(loaded.cfg.model)
  losses = leakage_probe.heldout_losses(loaded, corpus)
  if flags.FLAGS.json:

    def finite(value):
      return value if math.isfinite(value) else None

    record = {
      'step': loaded.step,
      'tokens': found.num_tokens,
      'changed': float(found.changed.mean()),
      'changed_per_layer': found.changed.tolist(),
      'log_likelihood_change': found.log_likelihood_change,
      'theory': theory and {key: finite(value) for key, value in theory.items()},
      'heldout_loss': losses,
    }
    json_output.show(record)
    return
  layers = ' '.join(f'{share:.1%}' for share in found.changed)
  print(f'step={loaded.step}: the second half of every held-out row was exchanged for another')
  print(
    f'experts change for {found.changed.mean():.2%} of {found.num_tokens:,} first-half tokens '
    f'(per MoE layer: {layers})'
  )
  print(f'their log-likelihoods change by {found.log_likelihood_change:.3g} nats on average')
  if theory is not None:
    print(
      f'an allocation can carry {theory["bits_per_token_per_layer"]:.2f} bits per token and layer '
      f'(lower bound {theory["lower_bound"]:.2f}), {theory["bits_per_token"]:.1f} in all layers'
    )
  text = ', '.join(f'{loss:.4f} {_LOSS_NAMES[name]}' for name, loss in losses.items())
  print(f'held-out loss: {text}')


if __name__ == '__main__':
  cli.run(main, define_flags)
