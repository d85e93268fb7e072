"""Scaling laws of DeepSeek LLM (arXiv 2401.02954, section 3), at the scale that is at hand.

python -m experiments.scaling_laws --scale=tiny|small --workdir=W [--jobs=2] [--dry_run]
  [--phases=hyper,noise,isoflop,heldout] [--kinds=dense,moe] [--data_source=text --data_path=...]
  [--out=experiments/scaling_laws/results/SCALE] [--points=CSV]

Trains the points of `study.py` phase by phase, fits (`moe_jax/analysis/scaling_laws.py`), and
writes report.md, CSV and figures into --out. A finished point is a file in the workdir and never
trained again; a point that was interrupted goes on from its checkpoint. --dry_run prints the points
with their FLOPs, tokens and expected time, and trains nothing. --points=.../points.csv writes the
report of runs that lie elsewhere.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs


def define_flags():
  """Flags of this command."""
  flags.DEFINE_enum('scale', None, ('tiny', 'small'), 'tiny (one CPU core) or small (one GPU)')
  cli.workdir_flag('directory of the finished and unfinished points')
  flags.DEFINE_bool('dry_run', False, 'print the points and what they cost; train nothing')
  flags.DEFINE_list('phases', ['hyper', 'noise', 'isoflop', 'heldout'], 'phases to train')
  flags.DEFINE_list('kinds', ['dense', 'moe'], 'families to train')
  flags.DEFINE_string('data_source', '', "data.source in place of the page's")
  flags.DEFINE_string('data_path', '', "data.path in place of the page's")
  cli.path_flag('points', '', 'points.csv from which the report is written; trains nothing')
  cli.path_flag('out', '', 'directory of the report; default: results/SCALE beside this file')
  local_jobs.define_flags()


def main(argv: Sequence[str]):
  """Trains what is missing, fits, writes."""
  from experiments.scaling_laws import phases

  phases.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
