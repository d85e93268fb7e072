"""Held-out loss, bits per byte and expert balance of a model, or tasks of lm-eval.

python -m experiments.evaluate --workdir=runs/quickstart [--step=200] [--json] \
  [--override=model.moe.num_experts_per_tok=3 ...]
python -m experiments.evaluate --workdir=runs/code [--by_domain] [--infill=64] [--repeated]
python -m experiments.evaluate --workdir=runs/v2_lite --tasks=hellaswag,gsm8k \
  [--limit=100 --num_fewshot=5 --batch_size=8 --include_path=DIR --json]
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors

if TYPE_CHECKING:
  from moe_jax.analysis import copying
  from moe_jax.api import run
  from moe_jax.data import corpus as corpus_lib
  from moe_jax.post_training import infilling
  from moe_jax.runs import trained_run
  from moe_jax.training import evaluate as evaluate_lib


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run, or of a downloaded checkpoint', bucket=True)
  cli.adapter_flag()
  flags.DEFINE_integer('step', None, 'checkpoint to evaluate; the newest whole one if not given')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')
  flags.DEFINE_multi_string(
    'override', [], 'KEY=VALUE: a setting of the model that keeps its weights; repeat it for more'
  )
  flags.DEFINE_bool('by_domain', False, 'figures of each domain of the text for itself too')
  flags.DEFINE_integer(
    'infill', 0, 'fill this many gaps per domain of the text, and count exact matches'
  )
  flags.DEFINE_bool(
    'repeated', False, 'what text costs the second time in a row too: whether the model copies'
  )
  flags.DEFINE_list(
    'tasks', [], 'tasks of lm-evaluation-harness (extra hf), in place of held-out text'
  )
  cli.path_flag('include_path', '', 'tasks: directory of further task files')
  flags.DEFINE_integer(
    'num_fewshot', None, "tasks: examples per question; the task's own if not given"
  )
  flags.DEFINE_integer('limit', None, 'tasks: only the first documents of each')
  flags.DEFINE_integer('batch_size', 8, 'tasks: rows of a forward pass')
  cli.distributed_flags()


def main(unused_argv: Sequence[str]):
  """Prints the figures of one checkpoint."""
  import jax

  from moe_jax.api import load, run
  from moe_jax.data import pipeline
  from moe_jax.processes import agreement
  from moe_jax.runs import overrides, trained_run
  from moe_jax.storage import fetch

  workdir, step = cli.required('workdir'), flags.FLAGS.step
  _check_flags()
  cli.start_processes({'workdir': workdir, 'step': step, 'override': flags.FLAGS.override})
  first = agreement.is_first()
  errors.require(
    not (flags.FLAGS.tasks or flags.FLAGS.infill) or jax.process_count() == 1,
    '--tasks and --infill run in one process; start the command once, with --distributed=off',
  )
  with agreement.together():
    workdir = fetch.local(workdir, '--workdir')
  values = {}
  if flags.FLAGS.override and not load.is_downloaded(workdir, '--workdir'):
    cfg = trained_run.read_config(workdir, step)
    values = overrides.parse(cfg, flags.FLAGS.override)
    overrides.changed(cfg, values)  # mistakes show before anything is loaded
  trained = load.read(workdir, step=step, adapter=flags.FLAGS.adapter, flag='--workdir')
  values = values or overrides.parse(trained.cfg, flags.FLAGS.override)
  loaded = run.Run(overrides.apply(trained, values), workdir)
  if flags.FLAGS.tasks:
    _tasks(loaded.trained, values)
    return
  with agreement.together():
    corpus = loaded.heldout_corpus(warn=_warn)
  agreement.require_same({'the text of config.data': corpus.fingerprint})
  repeated = _repeated(loaded, corpus) if flags.FLAGS.repeated else None
  figures = loaded.evaluate(corpus, progress=first)
  domains = _by_domain(loaded, corpus) if flags.FLAGS.by_domain else {}
  filled = _infill(loaded) if flags.FLAGS.infill else {}
  if first and flags.FLAGS.json:
    json_output.show(
      figures.as_dict(loaded.step)
      | ({'overrides': values} if values else {})
      | _objects(loaded.step, domains, filled, repeated)
    )
  elif first:
    under = ''.join(f' {key}={value}' for key, value in values.items())
    num_bytes = pipeline.num_bytes(corpus.heldout, loaded.config.model.max_seq_len)
    print(f'step={loaded.step}{under} {figures} bytes={num_bytes:,}')
    for line in _lines(domains, filled, repeated):
      print(line)


def _objects(
  step: int,
  domains: Mapping[str, 'evaluate_lib.Evaluation'],
  filled: Mapping[str, 'infilling.Filled'],
  repeated: 'copying.Copying | None',
) -> dict[str, object]:
  """What was asked for beyond the figures of the text, for JSON."""
  found: dict[str, object] = {}
  if domains:
    found['domains'] = {label: one.as_dict(step) for label, one in domains.items()}
  if filled:
    found['infill'] = {label: count._asdict() for label, count in filled.items()}
  if repeated:
    found['repeated'] = repeated._asdict()
  return found


def _lines(
  domains: Mapping[str, 'evaluate_lib.Evaluation'],
  filled: Mapping[str, 'infilling.Filled'],
  repeated: 'copying.Copying | None',
) -> list[str]:
  """The same in words."""
  lines = [
    f'  {label}: bits_per_byte={one.bits_per_byte:.3f} loss={one.loss:.4f}'
    for label, one in domains.items()
  ]
  lines += [f'  {label}: gaps filled, {count}' for label, count in filled.items()]
  if repeated:
    lines.append(
      f'  said twice: loss={repeated.first:.4f}, and {repeated.second:.4f} the second time'
    )
  return lines


def _by_domain(
  loaded: 'run.Run', corpus: 'corpus_lib.Corpus'
) -> 'dict[str, evaluate_lib.Evaluation]':
  from moe_jax.training import evaluate_domains

  found = evaluate_domains.by_domain(
    loaded.config, loaded.trained.variables, corpus, loaded.trained.mesh
  )
  return dict(found)


def _infill(loaded: 'run.Run') -> 'dict[str, infilling.Filled]':
  from moe_jax.post_training import infilling
  from moe_jax.runs import working_directory

  data = working_directory.resolved(loaded.config, loaded.directory).data
  made = infilling.gaps(data, flags.FLAGS.infill)
  return {label: infilling.measure(loaded, found) for label, found in made}


def _repeated(loaded: 'run.Run', corpus: 'corpus_lib.Corpus') -> 'copying.Copying':
  from moe_jax.analysis import copying, interventions

  one = loaded.trained
  found = copying.measure(interventions.Subject(one.cfg, one.variables, corpus, one.mesh))
  if found is None:
    raise errors.InputError(
      f'--repeated=True needs a held-out document longer than {one.cfg.model.max_seq_len // 2} '
      'tokens, half a row (config.model.max_seq_len), and this text has none; leave it out'
    )
  return found


def _warn(line: str):
  from moe_jax.processes import agreement

  if agreement.is_first():
    print(line, file=sys.stderr)


def _check_flags():
  values = flags.FLAGS
  errors.require(
    values.infill >= 0, f'--infill={values.infill} must be a number of gaps, or 0 for none'
  )
  if not values.tasks:
    cli.refuse_idle(('include_path', 'num_fewshot', 'limit', 'batch_size'), 'without --tasks')
    return
  of_text = ('by_domain', 'infill', 'repeated')
  cli.refuse_idle(of_text, 'with --tasks, which are not asked of held-out text')
  errors.require(
    importlib.util.find_spec('lm_eval') is not None,
    f'--tasks={",".join(values.tasks)} needs lm-eval, which is not installed; install the '
    "extra: pip install -e '.[hf]'",
  )


def _tasks(loaded: 'trained_run.Run', values: dict[str, object]):
  """Runs the harness and prints a line per task, or one JSON object."""
  from moe_jax.interop import lm_harness  # needs the extra, which nobody else does

  found = lm_harness.evaluate_tasks(
    loaded,
    flags.FLAGS.tasks,
    include_path=flags.FLAGS.include_path,
    num_fewshot=flags.FLAGS.num_fewshot,
    limit=flags.FLAGS.limit,
    batch_size=flags.FLAGS.batch_size,
  )
  if flags.FLAGS.json:
    json_output.show({'step': loaded.step, 'tasks': found, 'overrides': values}, default=str)
    return
  for task, metrics in found.items():
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    print(f'{task}: ' + ' '.join(f'{key}={value:.4f}' for key, value in numbers.items()))


if __name__ == '__main__':
  cli.run(main, define_flags)
