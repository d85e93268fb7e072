"""How fast are layer, step, decoding and compilation, beside their bounds and beside transformers?

python -m experiments.bench --suite=layer|step|decode|compile|scale [--platform=cpu|gpu] [--json]
  [--only=words] [--repeats=10] [--out=experiments/bench/results] [--notransformers]

Writes SUITE_PLATFORM.json, its table .md and its picture .png into --out.
With --only, lines that were not measured anew are kept. See the README for what the ratios mean.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors

SUITES = ('layer', 'step', 'decode', 'compile', 'scale')
HERE = pathlib.Path(__file__).parent


def define_flags():
  """Flags of this command."""
  flags.DEFINE_enum('suite', None, SUITES, 'what to measure')
  flags.DEFINE_enum('platform', None, ('cpu', 'gpu', 'tpu'), 'refuse to run anywhere else')
  flags.DEFINE_bool('json', False, 'print the results as a JSON list instead of a table')
  flags.DEFINE_string('only', '', 'only programs whose name and variant hold all of these words')
  flags.DEFINE_integer('repeats', 10, 'timed rounds, after one warm-up')
  cli.path_flag('out', str(HERE / 'results'), "directory of the results; '' writes nothing")
  flags.DEFINE_bool('transformers', True, 'compare with transformers where it is installed')


def main(unused_argv: Sequence[str]):
  """Measures, prints and writes."""
  import jax

  from experiments.bench import report
  from experiments.common import harness

  args = flags.FLAGS
  suite, platform = cli.required('suite'), jax.default_backend()
  errors.require(args.repeats >= 1, f'--repeats={args.repeats} must be at least 1')
  errors.require(
    args.platform in (None, platform),
    f'--platform={args.platform} was asked for, but JAX runs on {platform} here; install the extra '
    'for that platform, or leave the flag out',
  )
  only = tuple(word for word in args.only.split(',') if word)
  options = harness.Options(only, args.repeats, args.transformers)
  environment, peaks = harness.environment(), harness.measure_peaks()
  results = importlib.import_module(f'experiments.bench.{suite}').run(options, peaks)
  errors.require(bool(results), f'--only={args.only} names no program of --suite={suite}')
  if args.out:
    head = environment | {'peaks': dataclasses.asdict(peaks)}
    report.write(pathlib.Path(args.out), f'{suite}_{platform}', head, results)
  if args.json:
    fields = [{name: r.to_json()[name] for name in harness.FIELDS} for r in results]
    json_output.show(fields, indent=1)
  else:
    print(report.table(results))


if __name__ == '__main__':
  cli.run(main, define_flags)
