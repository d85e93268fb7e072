"""What routing did, in figures: the one contract between a run, its files and its pictures.

`figures` turns the statistics of `router_stats.RouterStats` (sums over the tokens of a batch or of
a whole evaluation) into arrays that every router has, whether or not anything balances it:

| key                               | shape        | unit and meaning |
| --------------------------------- | ------------ | --- |
| num_tokens                        | layers       | real tokens |
| load                              | layers, E    | assignments per expert, before any is dropped |
| dropped                           | layers, E    | of these, assignments that were dropped |
| max_vio                           | layers       | max load / mean load - 1; 0 = balanced |
| load_entropy                      | layers       | entropy of the load / ln E; 1 = balanced |
| load_gini                         | layers       | Gini coefficient of the load; 0 = balanced |
| dead_experts                      | layers       | experts with load 0 |
| drop_rate                         | layers       | dropped / load, each summed over the experts |
| gate_entropy                      | layers       | nats per token; scores divided by their sum |
| top_k_margin                      | layers       | score per token; worst chosen - best other |
| bias_norm                         | layers       | score; Euclidean norm of the bias's offset |
| bias_mean                         | layers       | score; mean of the bias's offset over experts |
| expert_similarity                 | layers       | cosine of two experts; NaN = not measured |
| device_load                       | layers, P    | kept assignments per virtual device |
| straggler_factor                  | layers       | max / mean of device_load; 1 = balanced |
| tokens_sent                       | layers, P, P | tokens of device i with a kept expert on j |
| all_to_all_bytes_per_token        | layers       | bytes; dispatch + combine, forward pass |
| loss_<name>                       | layers       | per token; each of LOSSES, unweighted         |
| attention_active_experts          | layers       | per token; only a mixture of attention heads |
| loss_attention_mutual_information | layers       | per token, unweighted; likewise |

Counts are int64, all else is float64. The bias's offset is measured from where it changes nothing:
0, or 1 for a multiplicative bias; without a bias it is 0. A layer that routed nothing reads as
balanced, and its means over tokens are 0.
"""

import io
import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from moe_jax import atomic_files, errors
from moe_jax.balance import balance_losses, router_stats
from moe_jax.config import moe_config
from moe_jax.data import npz_files

_Path = str | os.PathLike[str]

KEYS = (
  'num_tokens',
  'load',
  'dropped',
  'max_vio',
  'load_entropy',
  'load_gini',
  'dead_experts',
  'drop_rate',
  'gate_entropy',
  'top_k_margin',
  'bias_norm',
  'bias_mean',
  'expert_similarity',
  'device_load',
  'straggler_factor',
  'tokens_sent',
  'all_to_all_bytes_per_token',
  *(f'loss_{name}' for name in balance_losses.LOSSES),
)
ATTENTION_KEYS = ('attention_active_experts', 'loss_attention_mutual_information')


def figures(
  moe: moe_config.MoEConfig,
  stats: router_stats.RouterStats,
  *,
  embed_dim: int,
  bytes_per_number: int,
  expert_bias: np.ndarray | None,
  similarity: np.ndarray | None,
) -> dict[str, np.ndarray]:
  """All figures of the module's table, on the host.

  Args:
    moe: the layer's settings.
    stats: host arrays with a leading axis of layers.
    embed_dim: numbers that a token has on its way to an expert, and back.
    bytes_per_number: of these.
    expert_bias: [layers, E], None for a router without any.
    similarity: [layers] of `expert_similarity`, None where it was not computed.

  Returns:
    {key: array}: `KEYS`, and `ATTENTION_KEYS` for a mixture of attention heads.
  """
  _check_shapes(moe, stats)
  tokens = np.asarray(stats.sums.num_tokens, np.int64)
  sent = np.asarray(stats.tokens_sent, np.int64)
  remote = sent.sum(axis=(1, 2)) - np.trace(sent, axis1=1, axis2=2)
  offset = _bias_offset(moe, expert_bias, len(tokens))
  unknown = np.full(len(tokens), np.nan)
  return {
    'num_tokens': tokens,
    **_load_figures(moe, stats),
    'gate_entropy': _ratio(stats.sums.entropy, tokens),
    'top_k_margin': _ratio(stats.margin, tokens),
    'bias_norm': np.sqrt((offset**2).sum(axis=1)),
    'bias_mean': offset.mean(axis=1),
    'expert_similarity': unknown if similarity is None else np.asarray(similarity, np.float64),
    'tokens_sent': sent,
    'all_to_all_bytes_per_token': _ratio(remote, tokens) * embed_dim * bytes_per_number * 2,
    **{f'loss_{name}': _ratio(stats.losses[name], tokens) for name in balance_losses.LOSSES},
    **_attention_figures(stats),
  }


def _check_shapes(moe: moe_config.MoEConfig, stats: router_stats.RouterStats):
  """Stats of a single layer, or of another config, would broadcast to wrong figures."""
  e, d, load, sent = moe.num_experts, moe.num_virtual_devices, stats.sums.load, stats.tokens_sent
  if np.ndim(load) != 2 or np.shape(load)[1] != e or np.shape(sent)[1:] != (d, d):
    raise ValueError(
      f'stats.sums.load {np.shape(load)} and stats.tokens_sent {np.shape(sent)} must be '
      f'[layers, {e}] and [layers, {d}, {d}]'
    )


def _load_figures(
  moe: moe_config.MoEConfig, stats: router_stats.RouterStats
) -> dict[str, np.ndarray]:
  """The figures of load and dropped alone."""
  load, dropped = (np.asarray(a, np.int64) for a in (stats.sums.load, stats.dropped))
  device_load = router_stats.device_load(load - dropped, moe.num_virtual_devices)
  return {
    'load': load,
    'dropped': dropped,
    'max_vio': router_stats.max_vio(load),
    'load_entropy': _load_entropy(load),
    'load_gini': _gini(load),
    'dead_experts': (load == 0).sum(axis=1),
    'drop_rate': _ratio(dropped.sum(axis=1), load.sum(axis=1)),
    'device_load': device_load,
    'straggler_factor': router_stats.max_vio(device_load) + 1,
  }


def _ratio(total: npt.ArrayLike, count: npt.ArrayLike, empty: float = 0.0) -> np.ndarray:
  """total / count in float64, `empty` where count is 0; the shapes broadcast."""
  whole, parts = np.broadcast_arrays(np.asarray(total, np.float64), count)
  return np.divide(whole, parts, out=np.full(whole.shape, empty), where=parts > 0)


def _load_entropy(load: np.ndarray) -> np.ndarray:
  """[layers, E] -> [layers]; a single expert is balanced."""
  total = load.sum(axis=1, keepdims=True)
  share = _ratio(load, total, empty=1 / load.shape[1])
  entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
  return entropy / math.log(load.shape[1]) if load.shape[1] > 1 else np.ones(len(load))


def _gini(load: np.ndarray) -> np.ndarray:
  """Mean |difference| of two experts' loads / (2 mean load): [layers, E] -> [layers]."""
  e = load.shape[1]
  # In rising order the i-th load is the larger one of i pairs and the smaller one of e - 1 - i.
  excess = (np.sort(load, axis=1) * (2 * np.arange(e) - e + 1)).sum(axis=1)
  return _ratio(excess, e * load.sum(axis=1))


def _bias_offset(
  moe: moe_config.MoEConfig, expert_bias: np.ndarray | None, layers: int
) -> np.ndarray:
  """[layers, E] float64, how far the bias is from changing nothing."""
  if expert_bias is None:
    return np.zeros((layers, moe.num_experts))
  neutral = 1.0 if moe.expert_bias.form == 'multiplicative' else 0.0
  return np.asarray(expert_bias, np.float64) - neutral


def _attention_figures(stats: router_stats.RouterStats) -> dict[str, np.ndarray]:
  if stats.attention is None:
    return {}
  tokens = np.asarray(stats.attention.num_tokens, np.int64)
  totals = (stats.attention.active, stats.losses['attention_mutual_information'])
  return {key: _ratio(total, tokens) for key, total in zip(ATTENTION_KEYS, totals)}


def summary(figures: Mapping[str, np.ndarray]) -> dict[str, float | None]:
  """The mean over layers of every figure that is one number per layer; None where it is unknown."""
  means = {key: float(value.mean()) for key, value in figures.items() if value.ndim == 1}
  return {key: value if math.isfinite(value) else None for key, value in means.items()}


def write(path: _Path, figures: Mapping[str, np.ndarray]):
  """Writes an .npz file, whole or not at all; makes its directory."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  # pyright: ignore is for a key that would be savez's own option; none is.
  np.savez(buffer, **figures)  # pyright: ignore[reportArgumentType]
  atomic_files.write_bytes(path, buffer.getvalue())


def read(path: _Path) -> dict[str, np.ndarray]:
  """What `write` wrote.

  Raises:
    errors.InputError: the file is missing or damaged.
  """
  try:
    found = npz_files.headers(path)
    if sum(npz_files.num_bytes(*one) for one in found.values()) > pathlib.Path(path).stat().st_size:
      raise ValueError('its arrays are larger than the file')
    return {key: npz_files.read(path, key) for key in found}
  except npz_files.DAMAGE as e:
    raise errors.InputError(
      f'{path} is no readable file of routing figures ({e}); delete it, or restore it from a copy'
    ) from e


def read_history(directory: _Path) -> list[tuple[int, dict[str, np.ndarray]]]:
  """The files `<step>.npz` of a directory by rising step; empty when there is none.

  Raises:
    errors.InputError: names the file that cannot be read.
  """
  paths = {int(p.stem): p for p in pathlib.Path(directory).glob('*.npz') if p.stem.isdecimal()}
  return [(step, read(paths[step])) for step in sorted(paths)]
