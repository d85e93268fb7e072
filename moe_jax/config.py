"""What every field of a run's configuration means, its type, and the rules between fields.

Values live in `configs/*.py` (ml_collections, overridable from the command line); this module holds
the meaning. No dataclass field has a default, so `configs/base.py` is the only home of a value and
a missing or unknown key fails by name. The two meet in `from_dict`, which is called once, before
anything is compiled or written.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from moe_jax import config_attention, config_mesh, config_moe, errors

REMAT_POLICIES = ('none', 'moe_core', 'full', 'offload')
DTYPES = ('float32', 'bfloat16')
SCHEDULES = ('multi_step', 'cosine', 'constant', 'linear', 'stages')
STAGE_SHAPES = ('constant', 'linear', 'cosine')
SOURCES = ('python_source', 'text', 'jsonl', 'parquet', 'hf', 'synthetic', 'mixture')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A pre-norm decoder: `num_dense_layers` dense blocks, then MoE blocks."""

  vocab_size: int  # rows V of the embedding and of the output head (untied)
  max_seq_len: int  # L, the longest row a batch holds and the longest context that is generated
  embed_dim: int  # D, width of the residual stream
  mlp_dim: int  # FFN width of the dense layers
  num_layers: int  # all layers, dense ones included
  num_dense_layers: int  # leading layers that keep a dense FFN although the rest are MoE
  num_heads: int  # N, query heads
  norm_eps: float  # RMSNorm epsilon
  init_std: float  # standard deviation of every weight at the start (0.006 in the DeepSeek papers)
  dtype: str  # compute dtype, one of DTYPES; the router, the softmaxes and the losses stay float32
  param_dtype: str  # dtype of the kept weights, one of DTYPES; norms and router stay float32
  remat: str  # one of REMAT_POLICIES: which activations the backward pass recomputes
  scan_layers: bool  # layers of one kind are a loop; False unrolls it: slower to compile
  # Depth D of multi-token prediction (DeepSeek-V3, section 2.2): modules that predict one token
  # further each, trained with train.mtp_loss_weight; they can draft when text is generated.
  num_mtp_layers: int
  attention: config_attention.AttentionConfig
  moe: config_moe.MoEConfig

  @property
  def is_moe(self) -> bool:
    return self.moe.num_experts > 0

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers if self.is_moe else 0


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
  """One member of `data.source='mixture'`; its name in the config is its domain label."""

  source: str  # one of SOURCES except 'mixture'
  path: str  # as data.path
  weight: float  # share of the training rows, relative to the sum over components


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows of token ids."""

  source: str  # one of SOURCES
  path: str  # roots, files or globs (comma separated), or a dataset's name; '' = the default
  text_field: str  # column that holds the text (jsonl, parquet, hf)
  domain_field: str  # column that holds the domain label; '' = the source's own label
  heldout_fraction: float  # share of documents kept for evaluation, by a hash of their name
  synthetic_documents: int  # number of documents that source='synthetic' makes
  tokenizer: str  # 'bpe' (trained on the training split), 'bytes', or a path to a tokenizer.json
  bos_token: str  # begin-of-document token; must be in a tokenizer.json that is given
  eos_token: str  # end-of-document token, likewise
  fim_rate: float  # share of training documents rearranged as prefix-suffix-middle
  prefetch: int  # batches prepared ahead of the device
  cache_dir: str  # tokenised corpora and tokenizers; '' = $MOE_JAX_CACHE or ~/.cache/moe_jax
  mixture: Mapping[str, MixtureComponent]  # members when source='mixture', by domain label


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with decoupled weight decay on the matrices, norm clipping, warm-up and a schedule."""

  peak_lr: float  # learning rate at the end of the warm-up
  schedule: str  # one of SCHEDULES
  warmup_steps: int  # linear warm-up, from peak_lr / warmup_steps in the first step
  final_lr_fraction: float  # cosine and linear: last learning rate as a share of the peak
  multi_step_boundaries: tuple[
    float, ...
  ]  # multi_step: shares of num_steps at which the rate drops
  multi_step_factor: float  # factor at each boundary (0.316 in the DeepSeek papers)
  # stages: ((until share of num_steps, share of peak_lr at its end, one of STAGE_SHAPES), ...)
  stages: tuple[tuple[float, float, str], ...]
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip_norm: float  # largest global gradient norm; 0 = no clipping
  moment_dtype: str  # dtype in which both moments are kept, one of DTYPES (DeepSeek-V3: bfloat16)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  num_steps: int
  batch_size: int  # sequences per optimizer step, over all devices and processes
  # Ramp ((until step, batch size), ...): batch_size holds from the last of these steps on.
  batch_ramp: tuple[tuple[int, int], ...]
  micro_batch_size: int  # rows per forward pass, gradients add up; 0 = the whole batch
  loss_chunk: int  # tokens per device whose logits [tokens, V] exist at once
  seed: int  # decides initialisation and data order
  z_loss_weight: float  # weight of the mean squared log-partition of the vocabulary softmax
  mtp_loss_weight: float  # lambda of multi-token prediction (V3: 0.1), over the mean of its depths
  # Ramp ((until share of the run, lambda), ...): mtp_loss_weight holds from the last share on.
  mtp_loss_ramp: tuple[tuple[float, float], ...]
  log_every: int  # steps between log lines
  eval_every: int  # steps between held-out evaluations; 0 = only at the end
  routing_every: int  # steps between files of routing figures; 0 = only at the end
  sample_prompt: str  # prompt continued at the end of the run; '' = none
  sample_tokens: int  # length of that continuation


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  save_every: int  # steps between checkpoints; the last step is always saved
  keep_last: int  # newest checkpoints kept
  keep_every: int  # checkpoints at multiples of this step are kept for ever; 0 = none


@dataclasses.dataclass(frozen=True)
class PaperConfig:
  """Only for `describe`: the widths that the paper's FLOPs convention counts.

  DeepSeekMoE's tables count FFN widths before they are aligned (papers' 8/3 D times the relative
  expert size). 0 = the model's own width.
  """

  mlp_dim: float
  moe_mlp_dim: float


@dataclasses.dataclass(frozen=True)
class Config:
  """One run, whole."""

  init_from: str  # workdir whose newest weights a fresh run starts from; '' = random weights
  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  train: TrainConfig
  checkpoint: CheckpointConfig
  mesh: config_mesh.MeshConfig
  paper: PaperConfig


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds and checks a `Config` from nested dicts (a ConfigDict's `to_dict()`, or parsed JSON).

  Raises:
    errors.InputError: an unknown, missing or mistyped key, or a value that breaks a rule.
  """
  config = _build(Config, values, '')
  validate(config)
  return config


def to_dict(config: Config) -> dict[str, Any]:
  """The inverse of `from_dict`: nested plain dicts that JSON can hold."""
  return dataclasses.asdict(config)


def diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[str]:
  """Lines `key: old -> new` for every leaf in which two nested dicts differ."""
  lines = []
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key, '<absent>'), new.get(key, '<absent>')
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += diff(a, b, f'{prefix}{key}.')
    elif a != b:
      lines.append(f'{prefix}{key}: {a!r} -> {b!r}')
  return lines


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, Mapping):
    raise errors.InputError(
      f'config.{prefix[:-1]}={values!r} must be a section of {cls.__name__} fields'
    )
  fields = {f.name: f.type for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise errors.InputError(
        f'config.{prefix}{key} is not a known key{errors.did_you_mean(key, fields)}'
      )
  missing = [name for name in fields if name not in values]
  if missing:
    raise errors.InputError(
      f'config.{prefix}{missing[0]} is missing; start the config page from configs/base.py, which '
      f'has every key'
    )
  return cls(
    **{name: _coerce(kind, values[name], f'{prefix}{name}') for name, kind in fields.items()}
  )


def _coerce(kind: Any, value: Any, name: str) -> Any:
  """Checks one value against its field's type; ints become floats and lists become tuples."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, name + '.')
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple and isinstance(value, (list, tuple)):
    inner = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(inner) == len(value):
      return tuple(_coerce(k, v, f'{name}[{i}]') for i, (k, v) in enumerate(zip(inner, value)))
  elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
    return {key: _coerce(args[1], value[key], f'{name}.{key}') for key in value}
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and type(value) is kind:
    return value
  expected = getattr(kind, '__name__', None) if origin is None else str(kind)
  raise errors.InputError(
    f'config.{name}={value!r} must be of type {expected}, not {type(value).__name__}'
  )


def validate(config: Config):
  """Checks every rule that needs no data and no devices.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  validate_model(config.model)
  _validate_data(config.data)
  _validate_train(config.train)
  _validate_optim(config.optim, config.train)
  _validate_groups(config)
  errors.at_least(config.checkpoint, 'checkpoint', 1, 'save_every', 'keep_last')
  errors.at_least(config.checkpoint, 'checkpoint', 0, 'keep_every')
  errors.at_least(config.paper, 'paper', 0, 'mlp_dim', 'moe_mlp_dim')
  config_mesh.validate(config.mesh)


def _validate_groups(config: Config):
  """Groups of rows and chunks of tokens that compete must divide every forward pass."""
  moe, train, length = config.model.moe, config.train, config.model.max_seq_len
  if not config.model.is_moe:
    return
  for batch_size in {train.batch_size, *(size for _, size in train.batch_ramp)}:
    rows = train.micro_batch_size or batch_size
    group = moe.capacity.group_rows or rows
    errors.require(
      moe.capacity.policy == 'none' or rows % group == 0,
      f'config.model.moe.capacity.group_rows={group} must divide the rows of a forward pass, '
      f'{rows}; choose a divisor of {rows}, or 0 for all of them',
    )
    chunk = moe.options.chunk_tokens or length
    errors.require(
      moe.router != 'expert_choice' or rows * length % chunk == 0,
      f'config.model.moe.options.chunk_tokens={chunk} must divide the tokens of a forward pass, '
      f'{rows} rows x {length}; choose a divisor, or 0 for one row',
    )


def validate_model(model: ModelConfig):
  """The rules between the sizes of a model; see `validate`."""
  errors.at_least(
    model,
    'model',
    1,
    'vocab_size',
    'max_seq_len',
    'embed_dim',
    'mlp_dim',
    'num_layers',
    'num_heads',
  )
  errors.at_least(model, 'model', 0, 'num_dense_layers', 'norm_eps', 'init_std', 'num_mtp_layers')
  errors.choice('model.dtype', model.dtype, DTYPES)
  errors.choice('model.param_dtype', model.param_dtype, DTYPES)
  errors.choice('model.remat', model.remat, REMAT_POLICIES)
  attention = model.attention
  config_attention.validate(attention, model.num_heads)
  errors.require(
    not attention.num_experts
    or (
      attention.num_kv_heads * attention.num_experts == model.num_heads
      and not model.num_dense_layers
      and model.is_moe
    ),
    f'config.model.attention.num_experts={attention.num_experts} gives each expert one query head '
    f'per key-value head, in MoE layers only: num_kv_heads={attention.num_kv_heads} times it must '
    f'be num_heads={model.num_heads}, and num_dense_layers={model.num_dense_layers} must be 0; or '
    'set it to 0',
  )
  if model.is_moe:
    config_moe.validate(model.moe)
    errors.require(
      model.num_dense_layers < model.num_layers,
      f'config.model.num_dense_layers={model.num_dense_layers} leaves no MoE layer among '
      f'num_layers={model.num_layers}; lower it, or set model.moe.num_experts=0 for a dense model',
    )
  else:
    errors.require(
      model.moe.num_experts == 0,
      f'config.model.moe.num_experts={model.moe.num_experts} must be 0 (no MoE layers) or positive',
    )


def _validate_data(data: DataConfig):
  errors.choice('data.source', data.source, SOURCES)
  for name in ('heldout_fraction', 'fim_rate'):
    value = getattr(data, name)
    errors.require(0 <= value <= 1, f'config.data.{name}={value} must lie between 0 and 1')
  errors.require(
    0 < data.heldout_fraction < 1,
    f'config.data.heldout_fraction={data.heldout_fraction} must lie strictly between 0 and 1: both '
    f'splits need text',
  )
  errors.at_least(data, 'data', 1, 'prefetch', 'synthetic_documents')
  needs_path = ('text', 'jsonl', 'parquet', 'hf')
  if data.source == 'mixture':
    errors.require(
      bool(data.mixture),
      "config.data.mixture={} must name at least one component when data.source='mixture'",
    )
    for label, part in data.mixture.items():
      errors.choice(
        f'data.mixture.{label}.source', part.source, tuple(s for s in SOURCES if s != 'mixture')
      )
      errors.require(
        part.weight > 0,
        f'config.data.mixture.{label}.weight={part.weight} must be positive; or drop the component',
      )
      errors.require(
        bool(part.path) or part.source not in needs_path,
        f"config.data.mixture.{label}.path='' must name a file, glob or dataset for source "
        f'{part.source!r}',
      )
  else:
    errors.require(
      not data.mixture,
      f'config.data.mixture is set but data.source={data.source!r} would ignore it; '
      "set data.source='mixture' or empty it",
    )
    errors.require(
      bool(data.path) or data.source not in needs_path,
      f"config.data.path='' must name a file, glob or dataset for data.source={data.source!r}",
    )


def _validate_optim(optim: OptimConfig, train: TrainConfig):
  errors.choice('optim.schedule', optim.schedule, SCHEDULES)
  errors.choice('optim.moment_dtype', optim.moment_dtype, DTYPES)
  errors.require(
    optim.moment_dtype == 'float32' or max(optim.beta1, optim.beta2) <= 0.99,
    "config.optim.moment_dtype='bfloat16' has 8 bits, too few for averages that move by less than "
    f'1 %: beta1={optim.beta1} and beta2={optim.beta2} must not exceed 0.99; lower them (DeepSeek: '
    "0.9 and 0.95), or use 'float32'",
  )
  errors.at_least(
    optim,
    'optim',
    0,
    'warmup_steps',
    'final_lr_fraction',
    'weight_decay',
    'clip_norm',
    'beta1',
    'beta2',
  )
  errors.require(optim.peak_lr > 0, f'config.optim.peak_lr={optim.peak_lr} must be positive')
  errors.require(optim.eps > 0, f'config.optim.eps={optim.eps} must be positive')
  for name in ('beta1', 'beta2'):
    value = getattr(optim, name)
    errors.require(value < 1, f'config.optim.{name}={value} must lie in [0, 1)')
  bounds = optim.multi_step_boundaries
  errors.require(
    list(bounds) == sorted(bounds) and all(0 < b < 1 for b in bounds),
    f'config.optim.multi_step_boundaries={bounds} must be rising shares of the run between 0 and 1',
  )
  _validate_stages(optim, train)
  errors.require(
    optim.warmup_steps < max(train.num_steps, 1),
    f'config.optim.warmup_steps={optim.warmup_steps} must be smaller than '
    f'train.num_steps={train.num_steps}; '
    'lower it, or train longer',
  )


def _validate_stages(optim: OptimConfig, train: TrainConfig):
  name, shares = f'config.optim.stages={optim.stages}', [share for share, *_ in optim.stages]
  errors.require(
    bool(shares) == (optim.schedule == 'stages'),
    f"{name} is read by config.optim.schedule='stages', which needs it, and by no other; set both "
    'or neither',
  )
  for _, _, shape in optim.stages:
    errors.choice('optim.stages', shape, STAGE_SHAPES)
  errors.require(
    not shares
    or (
      shares == sorted(set(shares))
      and shares[-1] == 1
      and all(fraction > 0 for _, fraction, _ in optim.stages)
      and optim.warmup_steps < round(shares[0] * train.num_steps)
    ),
    f'{name} must be (until share, share of peak_lr, shape) with shares that rise to 1.0, positive '
    f'rates, and a first stage that outlasts optim.warmup_steps={optim.warmup_steps}',
  )


def _validate_train(train: TrainConfig):
  errors.at_least(train, 'train', 1, 'num_steps', 'batch_size', 'log_every', 'loss_chunk')
  errors.at_least(
    train,
    'train',
    0,
    'micro_batch_size',
    'seed',
    'z_loss_weight',
    'mtp_loss_weight',
    'eval_every',
    'routing_every',
    'sample_tokens',
  )
  errors.require(
    train.seed < 2**32,
    f'config.train.seed={train.seed} must be below 2^32; choose a smaller number',
  )
  shares = [share for share, _ in train.mtp_loss_ramp]
  errors.require(
    shares == sorted(set(shares))
    and all(0 < share < 1 and weight >= 0 for share, weight in train.mtp_loss_ramp),
    f'config.train.mtp_loss_ramp={train.mtp_loss_ramp} must be (until share of the run, weight) '
    'pairs whose shares rise between 0 and 1 and whose weights are not negative',
  )
  steps = [step for step, _ in train.batch_ramp]
  errors.require(
    steps == sorted(set(steps)) and all(step > 0 for step in steps),
    f'config.train.batch_ramp={train.batch_ramp} must be (until step, batch size) pairs whose '
    'steps are positive and rise',
  )
  sizes = {size for _, size in train.batch_ramp} | {train.batch_size}
  for size in sizes:
    errors.require(
      size >= 1, f'config.train.batch_ramp={train.batch_ramp} must hold positive batch sizes'
    )
    errors.require(
      not train.micro_batch_size or size % train.micro_batch_size == 0,
      f'config.train.micro_batch_size={train.micro_batch_size} must divide every batch size, also '
      f'{size}; '
      f'choose a divisor of {size}, or 0',
    )
