"""Runs tiny models of every DeepSeek family here and in transformers, and writes the differences.

python -m experiments.parity [--out=experiments/parity] [--names=v2,v3]

Needs torch, transformers and safetensors. Nothing is downloaded. Writes results.json and the
tables in README.md into --out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli


def define_flags():
  """Defines the command's flags."""
  flags.DEFINE_list('names', [], 'cases of hf_models.py; all without')
  cli.path_flag('out', 'experiments/parity', 'directory of README.md and results.json')


def main(argv: Sequence[str]):
  """Measures and writes."""
  from experiments.parity import differences

  differences.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
