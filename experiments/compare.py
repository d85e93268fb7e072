"""Any runs beside each other: what differs, what it costs, and whether the difference is real.

python -m experiments.compare runs/sigmoid runs/loss_free [--out=runs/compared] [--baseline=sigmoid]
  [--nopage] [--json]

Each argument is a workdir, or a directory that holds some. Runs whose configs differ in nothing but
the seed are one group; groups are paired by seed. Writes compare.html (interactive, one file),
report.md and report.html (to print), PNG and CSV files.
"""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli, html_report, json_output

if TYPE_CHECKING:
  from moe_jax.analysis.comparison import files
  from moe_jax.api import compare


def define_flags():
  """Flags of this command."""
  cli.path_flag('out', 'compared', 'directory of the page, the report, pictures and tables')
  flags.DEFINE_string('baseline', '', 'group, or a directory of it, to hold the others against')
  flags.DEFINE_bool('page', True, 'write the interactive page, which needs the extra compare')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def main(argv: Sequence[str]):
  """Reads the runs, writes the page and prints what they say."""
  import jax

  from moe_jax.analysis.comparison import page, page_data
  from moe_jax.api import compare

  # Shapes need no accelerator, and another process may be using it.
  jax.config.update('jax_platforms', 'cpu')
  if flags.FLAGS.page:
    page.check_library()
  found = compare.compare(*argv[1:], baseline=flags.FLAGS.baseline)
  out = pathlib.Path(flags.FLAGS.out)
  written = found.write(out, page=flags.FLAGS.page)
  paths = html_report.write(blocks(found, written), out)
  if flags.FLAGS.json:
    claims = [page_data.claim_data(claim) for claim in found.claims()]
    groups = {one.name: list(one.runs) for one in found.groups}
    json_output.show({'baseline': found.baseline, 'groups': groups, 'claims': claims})
    return
  print(found)
  first = [] if written.page is None else [written.page]
  others = [*first, *paths, *(path for path, _ in written.pictures), *written.tables]
  print('wrote: ' + ' '.join(map(str, others)))


def blocks(found: 'compare.Comparison', written: 'files.Written') -> list[html_report.Block]:
  """The comparison as a report: verdicts, pictures, what differs, what it costs."""
  from moe_jax.analysis.comparison import files, verdicts

  names = [one.name for one in found.groups]
  lines = [f'{verdicts.sentence(claim)}.' for claim in found.claims()]
  lines += [f'{line}.' for line in found.curve_sentences()]
  made: list[html_report.Block] = [html_report.Heading(files.title(found), 1)]
  if lines:
    made += [html_report.Heading('Verdict'), html_report.Bullets(lines)]
  if found.remarks():
    made += [html_report.Heading('Before you believe it'), html_report.Bullets(found.remarks())]
  made.append(html_report.Heading('Figures'))
  made += [html_report.Picture(path, caption) for path, caption in written.pictures]
  if found.settings:
    rows = [[f'`{key}`', *values] for key, values in found.settings.items()]
    made += [html_report.Heading('What differs'), html_report.Table(['setting', *names], rows)]
  made += [
    html_report.Heading('What it costs'),
    html_report.Table(['per run', *names], found.budget_rows()),
    html_report.Heading('Runs'),
    html_report.Table(
      ['arm', 'seeds', 'steps'],
      [
        [one.name, ', '.join(map(str, one.runs)), ', '.join(str(r.step) for r in one.runs.values())]
        for one in found.groups
      ],
    ),
  ]
  return made


if __name__ == '__main__':
  cli.run(main, define_flags, words=True)
