"""Which experts a task uses, which of them to train, and adapters: ESFT's scores and selection.

python -m experiments.esft score --workdir=runs/base --config=configs/sft.py \
  --config.init_from=runs/base [--tokens=131072] --out=scores/sums
python -m experiments.esft select --scores=scores/sums/summary.json [--kind=token] [--p=0.2] \
  --out=scores/sums
python -m experiments.esft extract --workdir=runs/esft --out=adapters/sums
python -m experiments.esft merge --workdir=runs/base --adapter=adapters/sums --out=runs/merged

`score` runs the model over training rows of the config's data and writes OUT/summary.json; `select`
takes the fewest experts of each layer that reach p and writes OUT/expert_cfg.json. Both are the
official files: those of the released checkpoints are read too. `extract` writes the experts that a
run has trained (configs/esft.py) as an adapter, a small directory of safetensors; `merge` puts an
adapter into its base and writes a new run.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from moe_jax import errors

ACTIONS = ('score', 'select', 'extract', 'merge')


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of the run: scored, tuned (extract), or the base (merge)')
  cli.config_flag()
  flags.DEFINE_integer('tokens', 131_072, 'score: tokens to read, about; the paper has 2^17')
  cli.path_flag('scores', '', 'select: a summary.json')
  flags.DEFINE_enum('kind', 'token', ('token', 'gate'), 'select: by which scores')
  flags.DEFINE_float('p', None, 'select: what the scores of a layer must reach; 0.2 or 0.1 if none')
  cli.path_flag('adapter', '', 'merge: directory that extract has written')
  cli.path_flag('out', '', 'directory that is written to')


def main(unused_argv: Sequence[str], action: str) -> None:
  """Writes the file of the action, and prints what is in it."""
  out = pathlib.Path(cli.required('out'))
  if action == 'select':
    _select(out)
  elif action == 'score':
    _score(out)
  else:
    _move(action, out)


def _select(out: pathlib.Path):
  from moe_jax.post_training import expert_config, expert_selection

  kind = flags.FLAGS.kind
  scores, first = expert_selection.read_scores(pathlib.Path(cli.required('scores')), kind)
  share = expert_selection.PAPERS_SHARE[kind] if flags.FLAGS.p is None else flags.FLAGS.p
  found = expert_selection.select(scores, first, share)
  out.mkdir(parents=True, exist_ok=True)
  expert_config.write(out / 'expert_cfg.json', found)
  total, fewest, most = expert_config.count(found)
  layers, experts = scores.shape
  print(
    f'{out / "expert_cfg.json"}: {total} of {scores.size} experts by {kind} scores, p={share:g}, '
    f'{total / layers:.2f} of {experts} per layer ({fewest} to {most})'
  )


def _move(action: str, out: pathlib.Path):
  from moe_jax.post_training import adapters

  workdir = cli.required('workdir')
  if action == 'extract':
    adapters.extract(workdir, out)
  else:
    adapters.merge(workdir, cli.required('adapter'), out, argv=sys.argv)


def _score(out: pathlib.Path):
  from moe_jax.api import load
  from moe_jax.data import corpus
  from moe_jax.post_training import expert_scores, expert_selection
  from moe_jax.runs import trained_run

  cfg, workdir = cli.resolve(flags.FLAGS.config), cli.required('workdir')
  tokens = flags.FLAGS.tokens
  errors.require(tokens > 0, f'--tokens={tokens} must be positive')
  loaded = load.load(workdir, flag='--workdir')
  text = corpus.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed)
  errors.require(
    trained_run.digest(text.tokenizer) == trained_run.digest(loaded.trained.tokenizer),
    f'config.data.tokenizer={cfg.data.tokenizer!r} is not the tokenizer of --workdir={workdir}, to '
    'which its ids are other text; pass '
    f'--config.data.tokenizer={pathlib.PurePath(workdir) / "tokenizer.json"}',
  )
  found = expert_scores.score(loaded.trained, cfg, text, tokens)
  out.mkdir(parents=True, exist_ok=True)
  expert_selection.write_scores(out / 'summary.json', found)
  busiest = found.token.max(axis=1)
  print(
    f'{out / "summary.json"}: {found.num_tokens:,} tokens; the busiest expert of a layer takes '
    f'{busiest.min():.1%} to {busiest.max():.1%} of the choices, '
    f'{1 / loaded.config.model.moe.num_experts:.1%} if all were alike'
  )


if __name__ == '__main__':
  cli.run_action(main, define_flags, ACTIONS)
