"""Random configs of a tiny run: broken ones, which are refused, and valid ones, which train.

Both begin with a config that is valid. A broken one has one value (or key) changed. A valid one
gets many settings in turn, each kept only if the config's own rules allow it beside the others.
"""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_jax import errors
from moe_jax.config import attention_config, moe_config, parse, router_traits, schema

Values = dict[str, Any]

# What no field takes, whatever its type and its rules.
NEVER = (float('nan'), float('inf'), 1e30, 10**20, b'bytes', object, {'a': {'b': 1}}, (None,), [[]])
# What many fields refuse, some with a rule that only other values make apply.
DOUBTFUL = (
  -1,
  0,
  1,
  2,
  7,
  63,
  10**6,
  -0.5,
  0.0,
  1e-9,
  0.3,
  1.5,
  True,
  False,
  '',
  'x',
  'a/b',
  (),
  None,
)
DOUBTFUL += ('', (), (1,), (0.5, 0.5), ((2, 3),), ((0.5, 0.1, 'cosine'),), '5', [], {})


def leaves(section: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """Paths of all values of nested dicts."""
  for key, value in section.items():
    if isinstance(value, Mapping) and value:
      yield from leaves(value, (*path, key))
    else:
      yield (*path, key)


def with_value(values: Values, path: Sequence[str], value: Any) -> Values:
  """A copy with one value changed or added; `...` takes the key away."""
  changed = copy.deepcopy(values)
  section = changed
  for name in path[:-1]:
    section = section[name]
  if value is ...:
    del section[path[-1]]
  else:
    section[path[-1]] = value
  return changed


def broken(values: Values, rng: random.Random) -> tuple[str, Values, bool]:
  """(what was changed, the config, whether it must be refused).

  A key is lost or unknown, a value is of no type that the field has, or one that rules may refuse.
  """
  path = rng.choice(sorted(leaves(values)))
  name = '.'.join(path)
  kind = rng.choice(('lost', 'unknown', 'never', 'doubtful', 'doubtful', 'doubtful'))
  if kind == 'lost':
    return f'{name} left out', with_value(values, path, ...), 'mixture' not in path
  if kind == 'unknown':
    other = (*path[:-1], rng.choice((path[-1] + 'x', path[-1][1:], 'new', '')))
    return f'{".".join(other)}=1', with_value(values, other, 1), 'mixture' not in path
  value = rng.choice(NEVER if kind == 'never' else DOUBTFUL)
  return f'{name}={value!r}', with_value(values, path, value), kind == 'never'


def refusal(values: Values) -> str:
  """Why a config is refused, one line; '' if it is valid.

  Raises:
    AssertionError: it is refused in another way than by one line that begins with `config`.
  """
  try:
    parse.from_dict(values)
  except errors.InputError as error:
    line = str(error)
    assert line.startswith('config') and '\n' not in line and len(line) < 1000, line
    return line
  return ''


ROUTERS = sorted(router_traits.known())
_LATENT = dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=8, v_head_dim=5)
CHOICES: dict[str, Sequence[Any]] = {
  'model.attention.kind': attention_config.KINDS,
  'model.attention.impl': ('reference', 'short', 'chunked', 'dot_product'),
  'model.attention.num_kv_heads': (1, 2),
  'model.attention.rope.layout': attention_config.ROPE_LAYOUTS,
  'model.attention.rope.yarn.factor': (1.0, 2.0),
  'model.attention.num_experts': (0, 0, 2),
  'model.attention.mla.q_lora_rank': (0, 7),
  'model.dtype': ('float32', 'float32', 'bfloat16'),
  'model.remat': ('none', 'moe_core', 'full'),
  'model.scan_layers': (True, False),
  'model.num_layers': (2, 3),
  'model.num_dense_layers': (0, 1),
  'model.num_mtp_layers': (0, 0, 1, 2),
  'model.moe.num_shared_experts': (0, 1, 2),
  'model.moe.num_experts_per_tok': (1, 2, 3),
  'model.moe.score_func': moe_config.SCORE_FUNCS,
  'model.moe.norm_topk_prob': (True, False),
  'model.moe.routed_scaling_factor': (1.0, 2.5),
  'model.moe.num_expert_groups': (1, 2, 4),
  'model.moe.num_limited_groups': (1, 2),
  'model.moe.group_score': moe_config.GROUP_SCORES,
  'model.moe.num_virtual_devices': (1, 2, 4),
  'model.moe.dispatch': moe_config.DISPATCHES,
  'model.moe.grouped_matmul': ('auto', 'blocks', 'ragged_dot', 'int8'),
  'model.moe.exchange.kind': moe_config.EXCHANGES,
  'model.moe.exchange.buffer_factor': (0.0, 1.0, 2.0),
  'model.moe.expert_bias.update_rule': moe_config.BIAS_RULES,
  'model.moe.expert_bias.form': moe_config.BIAS_FORMS,
  'model.moe.capacity.policy': moe_config.DROP_POLICIES,
  'model.moe.capacity.factor': (0.5, 1.0, 2.0),
  'model.moe.capacity.group_rows': (0, 1, 2),
  'model.moe.capacity.exempt_fraction': (0.0, 0.3),
  'model.moe.options.input_jitter': (0.0, 0.1),
  'model.moe.options.random_second_expert': (False, True),
  'model.moe.options.logit_norm_scale': (0.0, 1.0),
  'model.moe.options.hash_table': moe_config.HASH_TABLES,
  'model.moe.options.inference': moe_config.INFERENCE_RULES,
  'model.moe.balance.adaptive.loss': ('', 'squared_deviation'),
  'optim.schedule': ('cosine', 'multi_step', 'linear', 'constant'),
  'optim.moment_dtype': schema.DTYPES,
  'optim.clip_norm': (0.0, 1.0),
  'train.micro_batch_size': (0, 8),
  'train.z_loss_weight': (0.0, 1e-3),
  'mesh.expert': (1, 2, 4),
  'mesh.fsdp': (1, 2),
  'mesh.tensor': (1, 1, 2),
  'mesh.sequence': (1, 1, 2),
  'mesh.zero1': (True, False),
}
CHOICES |= {
  f'model.moe.balance.{name}.{field}': values
  for name in moe_config.LOSSES
  for field, values in (('weight', (0.0, 0.0, 0.01)), ('scope', moe_config.LOSS_SCOPES))
}


def valid(values: Values, rng: random.Random, number: int) -> schema.Config:
  """A config with many random settings; routers take turns by `number`."""
  values = copy.deepcopy(values)
  for key, value in _LATENT.items():
    values['model']['attention']['mla'][key] = value
  names = sorted(CHOICES)
  rng.shuffle(names)
  wanted = [('model.moe.router', ROUTERS[number % len(ROUTERS)])]
  wanted += [('model.moe.dispatch', moe_config.DISPATCHES[number // 3 % 4])]
  wanted += [(name, rng.choice(CHOICES[name])) for name in names if name != 'model.moe.dispatch']
  for name, value in wanted:
    changed = with_value(values, name.split('.'), value)
    if name == 'model.moe.router':
      changed = _suited(changed, value)
    if name == 'model.moe.dispatch' and value == 'capacity':  # only with a limit, see moe_rules
      policy = rng.choice(moe_config.DROP_POLICIES[1:])
      changed = with_value(changed, ('model', 'moe', 'capacity', 'policy'), policy)
    if not refusal(changed):
      values = changed
  return parse.from_dict(values)


def _suited(values: Values, router: str) -> Values:
  """What a router cannot do without."""
  moe, traits = values['model']['moe'], router_traits.LIBRARY[router]
  moe['dispatch'] = 'capacity' if traits.bound and traits.bound.exact else 'dense'
  for name in moe_config.LOSSES:
    moe['balance'][name]['weight'] = 0.0
  if 'replay_path' in traits.options:
    moe['options'] |= {'replay_path': 'replay.npz', 'replay_rows': 4}
  if 'skew' in traits.options:
    moe['options']['skew'] = 0.5
  return values
