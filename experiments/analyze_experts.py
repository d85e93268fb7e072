"""What the experts of a trained run learned: figures, readings and arrays, per layer.

python -m experiments.analyze_experts --workdir=runs/quickstart [--probe=disable_top,domains,...]
  [--step=N] [--compare_step=M] [--tokens=32768] [--out=DIR] [--json]

Writes report.md, report.html, a PNG per probe and experts.npz to WORKDIR/experts. `--tokens` is how
much of the held-out text is looked at; 0 = all of it.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli, html_report, json_output
from moe_jax import errors

if TYPE_CHECKING:
  from moe_jax.analysis.probes import probe_types


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run')
  flags.DEFINE_list('probe', ['all'], 'names of probes; an unknown one lists them all')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  flags.DEFINE_integer('compare_step', None, 'checkpoint for saturation; all others if not given')
  flags.DEFINE_integer('tokens', 32_768, 'held-out tokens to look at; 0 = all')
  cli.path_flag('out', '', 'directory of the report; WORKDIR/experts without')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def _chosen() -> list[str]:
  from moe_jax.analysis import probes

  names = flags.FLAGS.probe
  if names == ['all']:
    return list(probes.PROBES)
  for name in names:
    hint = errors.did_you_mean(name, probes.PROBES)
    errors.require(
      name in probes.PROBES,
      f'--probe={name} must be one of all, {", ".join(probes.PROBES)}{hint}',
    )
  return list(dict.fromkeys(names))


def _context(workdir: str) -> 'probe_types.Context':
  """The run, and for saturation its other checkpoints."""
  from moe_jax.analysis import assignments, interventions
  from moe_jax.analysis.probes import probe_types
  from moe_jax.runs import trained_run

  values = flags.FLAGS
  errors.require(values.tokens >= 0, f'--tokens={values.tokens} must be at least 0 (0 = all)')
  assignments.check(trained_run.read_config(workdir, values.step).model)
  loaded = trained_run.load(workdir, values.step)
  corpus = trained_run.heldout_corpus(
    loaded, workdir, warn=lambda line: print(line, file=sys.stderr)
  )
  steps = [values.compare_step]
  if values.compare_step is None:
    with trained_run.reader(pathlib.Path(workdir)) as reader:
      steps = [step for step in reader.steps() if step != loaded.step]
  others = {}
  if 'saturation' in _chosen():
    others = {step: trained_run.load(workdir, step).variables for step in steps}
  subject = interventions.Subject(loaded.cfg, loaded.variables, corpus, loaded.mesh)
  return probe_types.Context(subject, values.tokens, others, loaded.step)


def main(unused_argv: Sequence[str]):
  """Runs the probes and writes what they found."""
  from moe_jax.analysis.probes import report
  from moe_jax.balance import routing_figures

  workdir, names = cli.required('workdir'), _chosen()
  context = _context(workdir)
  found, skipped = report.run(context, names, progress=not flags.FLAGS.json)
  out = pathlib.Path(flags.FLAGS.out or pathlib.Path(workdir) / 'experts')
  pictures = report.draw(found, out)
  arrays = {f'{name}.{k}': v for name, one in found.items() for k, v in one.arrays.items()}
  routing_figures.write(out / 'experts.npz', arrays)
  blocks = [html_report.Heading(f'What the experts learned: step {context.step}', 1)]
  for name, one in found.items():
    title = html_report.Heading(name.replace('_', ' ').capitalize())
    blocks += [title, html_report.Text(one.reading), html_report.Picture(pictures[name], name)]
  if skipped:
    lines = [f'`{name}`: {reason}' for name, reason in skipped.items()]
    blocks += [html_report.Heading('Skipped'), html_report.Bullets(lines)]
  written = [*html_report.write(blocks, out), out / 'experts.npz', *pictures.values()]
  if flags.FLAGS.json:
    readings = {name: one.reading for name, one in found.items()}
    json_output.show({'step': context.step, 'readings': readings, 'skipped': skipped})
    return
  for name, one in found.items():
    print(f'{name}: {one.reading}\n')
  for name, reason in skipped.items():
    print(f'{name}: skipped, {reason}\n')
  print('wrote: ' + ' '.join(str(path) for path in written))


if __name__ == '__main__':
  cli.run(main, define_flags)
