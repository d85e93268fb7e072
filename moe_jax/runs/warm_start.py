"""A run that starts from the weights of another one, `config.init_from`.

For a longer context under YaRN, for fine-tuning of an imported checkpoint, for the same weights
under other routing. Weights are taken over and must fit; the optimizer starts anew. What routing
remembers is taken over where both runs have it (an expert bias, a hash table), and starts anew
where only the new one has it, or another form of it; so does a value head of PPO. Modules of
multi-token prediction that the new run has not are left behind. A recording for router `replay` is
always the new run's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax import errors, trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import integrity
from moe_jax.config import parse, schema
from moe_jax.models import model_variables
from moe_jax.training import lora, train_state, value_head

_AHEAD = 'mtp_layers'  # the parameters of multi-token prediction


def check(cfg: schema.Config, source: schema.Config):
  """Refuses a source whose weights do not fit the model.

  Args:
    cfg: the new run.
    source: config of the run at `cfg.init_from`.

  Raises:
    errors.InputError: names the first weight that differs and the settings that do.
  """
  wanted, has = (_shapes(model_variables.abstract_params(c.model)) for c in (cfg, source))
  if not cfg.model.num_mtp_layers:
    has = {name: shape for name, shape in has.items() if not name.startswith(f'{_AHEAD}/')}
  for name in [*wanted, *(name for name in has if name not in wanted)]:
    if wanted.get(name) != has.get(name):
      changes = '; '.join(changed_settings(cfg, source))
      raise errors.InputError(
        f'config.init_from={cfg.init_from} has {_describe(has.get(name))} as params/{name}, where '
        f'this config needs {_describe(wanted.get(name))}; make the sizes of config.model equal '
        f'(theirs -> ours: {changes})'
      )


def changed_settings(cfg: schema.Config, source: schema.Config) -> list[str]:
  """Lines `model.key: theirs -> ours`."""
  theirs, ours = (parse.to_dict(c)['model'] for c in (source, cfg))
  return parse.diff(theirs, ours, 'model.')


def read(
  cfg: schema.Config,
  mesh: jax.sharding.Mesh,
  checkpointer: checkpointer_lib.Checkpointer,
  say: Callable[[str], None],
) -> dict[str, Any]:
  """The newest whole weights of the source in the new run's dtypes, and what routing remembers.

  Args:
    cfg: the new run, see `check`.
    mesh: where to put them.
    checkpointer: a reader of the source's checkpoints.
    say: prints one line.

  Returns:
    `params`, and those leaves of `router_state` that the new run has too.

  Raises:
    errors.InputError: no checkpoint there is whole, or the newest that is does not fit.
  """
  fresh = train_state.abstract_state(cfg, mesh)

  def wanted(meta: trees.Json) -> dict[str, Any]:
    source = parse.from_record(meta['config'])
    check(cfg, source)
    theirs = train_state.abstract_state(source, mesh)
    shared = common(theirs.router_state, fresh.router_state)
    return {'params': theirs.params} | ({'router_state': shared} if shared else {})

  restored = checkpointer.restore(wanted, partial=True)
  if restored is None:
    raise errors.InputError(
      f'config.init_from={cfg.init_from} holds no finished checkpoint; give a workdir that has one'
    )
  say(f'starting from the weights of {cfg.init_from}, step {restored.step}')
  # A damaged newer step may have had another config.
  return adapted(cfg, parse.from_record(restored.meta['config']), restored.state, fresh, say)


def adapted(
  cfg: schema.Config,
  source: schema.Config,
  found: trees.Json,
  fresh: train_state.TrainState,
  say: Callable[[str], None],
) -> dict[str, Any]:
  """What was read in the new run's dtypes, without what routing remembers there alone.

  Args:
    cfg: the new run.
    source: config of the weights.
    found: `params` and, if there is any, `router_state`.
    fresh: shapes and dtypes of the new run.
    say: prints a line for each setting of the model that is another one.
  """
  for change in changed_settings(cfg, source):
    say(f'config changed against init_from: {change}')
  params = found['params']
  if lora.KEY in params:
    params = jax.jit(lora.merged)(params)
  if value_head.KEY not in fresh.params:
    params = value_head.without(params)
  if _AHEAD not in fresh.params:
    params = {name: value for name, value in params.items() if name != _AHEAD}
  anew = {lora.KEY, value_head.KEY} - params.keys()
  base = {name: value for name, value in fresh.params.items() if name not in anew}
  params = jax.tree.map(lambda x, to: x.astype(to.dtype), params, base)
  state = common(found.get('router_state', {}), fresh.router_state)
  if cfg.model.moe.expert_bias.form != source.model.moe.expert_bias.form:
    state = _without(state, 'expert_bias')  # neutral is 0 in the one form and 1 in the other
  return {'params': params, 'router_state': state}


def _without(tree: trees.Json, name: str) -> dict[str, Any]:
  """The tree without the leaves of that name; no empty dicts."""
  found = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      inner = _without(value, name)
      found |= {key: inner} if inner else {}
    elif key != name:
      found[key] = value
  return found


def _shapes(tree: trees.Tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {integrity.leaf_name(path): leaf.shape for path, leaf in leaves}


def _describe(shape: tuple[int, ...] | None) -> str:
  return 'nothing' if shape is None else str(list(shape))


def common(a: trees.Json, b: trees.Json) -> dict[str, Any]:
  """The leaves of `a` that `b` has with the same shape; no empty dicts."""
  found = {}
  for key in a.keys() & b.keys():
    if isinstance(a[key], Mapping):
      inner = common(a[key], b[key])
      found |= {key: inner} if inner else {}
    elif a[key].shape == b[key].shape and key != 'assignments':
      found[key] = a[key]
  return found
