"""Do runs survive? Kills and resumes real runs, damages checkpoints, tries random configs.

Every part prints a table, and all of it goes to WORKDIR/torture.json; status 1 says that a promise
was broken. Parts: `kills` (a run is killed at random moments and in named phases until it is
complete, then compared bit by bit with an unbroken one), `damage` (every kind of damage to every
file of a checkpoint, for every reader), `fuzz` (valid random configs are built, trained for two
steps, saved, restored and decoded), `hygiene` (memory, open files and threads of 2,000 steps in one
process).

python -m experiments.torture --workdir=runs/torture [--minutes=15] \
  [--parts=kills,damage,fuzz,hygiene] [--seed=0] [--kills=100] [--damages=400] [--fuzz=200]
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from moe_jax import errors

PARTS = ('kills', 'damage', 'fuzz', 'hygiene')


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('scratch directory; holds torture.json at the end')
  flags.DEFINE_float('minutes', 15.0, 'no new kill, damage or config is begun after that')
  flags.DEFINE_list('parts', ['kills', 'damage'], f'of {", ".join(PARTS)}')
  flags.DEFINE_integer('seed', 0, 'decides moments, files and configs')
  flags.DEFINE_integer('kills', 10**6, 'kills at most')
  flags.DEFINE_integer('damages', 400, 'damaged files, each read by every reader')
  flags.DEFINE_integer('fuzz', 200, 'valid random configs')


def main(unused_argv: Sequence[str]) -> int:
  """Runs the parts one after the other; 1 if a promise was broken."""
  values, workdir = flags.FLAGS, pathlib.Path(cli.required('workdir'))
  unknown = [part for part in values.parts if part not in PARTS]
  errors.require(not unknown, f'--parts={",".join(unknown)} must be of {", ".join(PARTS)}')
  workdir.mkdir(parents=True, exist_ok=True)
  stop = time.monotonic() + 60 * values.minutes
  path, found = workdir / 'torture.json', {}
  for part in values.parts:
    found[part] = _run(part, workdir / part, stop)
    path.write_text(json.dumps(found, indent=1))
  broken = [f'{part}: {line}' for part, result in found.items() for line in result['broken']]
  for line in broken:
    print(f'BROKEN {line}')
  print(f'{path}: {len(broken)} broken promises')
  return 1 if broken else 0


def _run(part: str, workdir: pathlib.Path, stop: float) -> dict:
  values = flags.FLAGS
  if part == 'kills':
    from experiments.torture import kills

    return kills.run(workdir, stop, values.seed, values.kills)
  if part == 'damage':
    from experiments.torture import damage

    return damage.run(workdir, stop, values.seed, values.damages)
  if part == 'hygiene':
    from experiments.torture import hygiene

    return hygiene.run(workdir, stop)
  from experiments.torture import fuzz

  return fuzz.run(workdir, stop, values.seed, values.fuzz)


if __name__ == '__main__':
  sys.exit(cli.run(main, define_flags))
