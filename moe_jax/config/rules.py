"""The rules between the fields of a configuration that need no data and no devices."""

from moe_jax import errors
from moe_jax.config import (
  attention_config,
  mesh_config,
  moe_rules,
  objective_rules,
  router_traits,
  schema,
)


def validate(config: schema.Config):
  """Checks every rule that needs no data and no devices.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  objective_rules.validate_start(config)
  validate_model(config.model)
  _validate_data(config.data)
  objective_rules.validate(config)
  _validate_trainable(config)
  _validate_train(config.train)
  _validate_optim(config.optim, config.train)
  _validate_groups(config)
  errors.at_least(config.checkpoint, 'checkpoint', 1, 'save_every', 'keep_last')
  errors.at_least(config.checkpoint, 'checkpoint', 0, 'keep_every')
  errors.at_least(config.paper, 'paper', 0, 'mlp_dim', 'moe_mlp_dim')
  mesh_config.validate(config.mesh)


def _validate_groups(config: schema.Config):
  """Groups of rows and chunks of tokens that compete must divide every forward pass."""
  moe, train, length = config.model.moe, config.train, config.model.max_seq_len
  if not config.model.is_moe:
    return
  traits = router_traits.of(moe)
  bound, chunked = traits.bound, f'router={moe.router!r}'
  if 'chunk_tokens' in traits.options:
    chunked = f'options.chunk_tokens={moe.options.chunk_tokens}'
  for batch_size in {train.batch_size, *(size for _, size in train.batch_ramp)}:
    rows = train.micro_batch_size or batch_size
    group = moe.capacity.group_rows or rows
    errors.require(
      moe.capacity.policy == 'none' or rows % group == 0,
      f'config.model.moe.capacity.group_rows={group} must divide the rows of a forward pass, '
      f'{rows}; choose a divisor of {rows}, or 0 for all of them',
    )
    if bound:
      chunk = bound.chunk(moe, length)
      errors.require(
        rows * length % chunk == 0,
        f'config.model.moe.{chunked} makes chunks of {chunk} tokens, which must divide the tokens '
        f'of a forward pass, {rows} rows x {length}; choose a divisor, or chunks of one row',
      )


def validate_model(model: schema.ModelConfig):
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
  errors.choice('model.dtype', model.dtype, schema.DTYPES)
  errors.choice('model.param_dtype', model.param_dtype, schema.DTYPES)
  errors.choice('model.remat', model.remat, schema.REMAT_POLICIES)
  attention = model.attention
  attention_config.validate(attention, model.num_heads)
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
    moe_rules.validate(model.moe)
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


def _validate_data(data: schema.DataConfig):
  errors.choice('data.source', data.source, schema.SOURCES)
  errors.choice('data.chat_format', data.chat_format, schema.CHAT_FORMATS)
  for name in ('heldout_fraction', 'fim_rate'):
    value = getattr(data, name)
    errors.require(0 <= value <= 1, f'config.data.{name}={value} must lie between 0 and 1')
  errors.require(
    0 < data.heldout_fraction < 1,
    f'config.data.heldout_fraction={data.heldout_fraction} must lie strictly between 0 and 1: both '
    f'splits need text',
  )
  errors.at_least(data, 'data', 1, 'prefetch', 'synthetic_documents')
  needs_path = ('text', 'jsonl', 'parquet', 'hf', 'hf_conversations', 'hf_preferences')
  if data.source == 'mixture':
    errors.require(
      bool(data.mixture),
      "config.data.mixture={} must name at least one component when data.source='mixture'",
    )
    errors.require(
      not data.path,
      f"config.data.path={data.path!r} is set but data.source='mixture' would ignore it; empty it, "
      'and name files and datasets as data.mixture.LABEL.path',
    )
    for label, part in data.mixture.items():
      errors.choice(
        f'data.mixture.{label}.source',
        part.source,
        tuple(s for s in schema.SOURCES if s != 'mixture'),
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


def _validate_trainable(config: schema.Config):
  trainable, model = config.trainable, config.model
  errors.choice('trainable.kind', trainable.kind, schema.TRAINABLE)
  chosen = [
    name for name in ('experts', 'shared_experts', 'non_expert_modules') if getattr(trainable, name)
  ]
  errors.at_least(trainable, 'trainable', 1, 'lora_rank')
  errors.require(
    trainable.lora_alpha > 0, f'config.trainable.lora_alpha={trainable.lora_alpha} must be positive'
  )
  where = f'config.trainable.kind={trainable.kind!r}'
  errors.require(
    trainable.kind == 'experts' or not chosen,
    f'{where} would ignore {" and ".join(f"trainable.{name}" for name in chosen)}, which the page, '
    "an override or trainable.expert_config sets; set trainable.kind='experts'",
  )
  errors.require(
    trainable.kind != 'lora' or bool(config.init_from),
    f"{where} is for a trained model, and config.init_from='' names none; pass "
    "--config.init_from=WORKDIR, or set trainable.kind='all'",
  )
  if trainable.kind != 'experts':
    return
  errors.require(
    bool(config.init_from) and model.is_moe,
    f'{where} trains experts of a trained MoE model, and config.init_from={config.init_from!r} '
    f'with model.moe.num_experts={model.moe.num_experts} names none; pass '
    "--config.init_from=WORKDIR, or set trainable.kind='all'",
  )
  errors.require(
    len(trainable.experts) == model.num_moe_layers
    and all(
      len(set(ids)) == len(ids) and all(0 <= e < model.moe.num_experts for e in ids)
      for ids in trainable.experts
    ),
    f'config.trainable.expert_config: experts={str(trainable.experts)[:80]} must be a list of '
    f'different experts below {model.moe.num_experts} for each of the {model.num_moe_layers} MoE '
    'layers; give an expert_cfg.json that experiments.esft has written for this model',
  )
  errors.require(
    any(trainable.experts) or trainable.shared_experts or trainable.non_expert_modules,
    f'{where} with no expert, and with shared_experts and non_expert_modules off, trains nothing; '
    'choose experts with python -m experiments.esft select',
  )


def _validate_optim(optim: schema.OptimConfig, train: schema.TrainConfig):
  errors.choice('optim.schedule', optim.schedule, schema.SCHEDULES)
  errors.choice('optim.moment_dtype', optim.moment_dtype, schema.DTYPES)
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
    'spike_sigma',
  )
  errors.at_least(optim, 'optim', 2, 'spike_window')
  errors.require(
    optim.spike_sigma == 0 or train.max_skipped_steps > 0,
    f'config.optim.spike_sigma={optim.spike_sigma} skips steps, and '
    'config.train.max_skipped_steps=0 allows none; allow some (3), or set spike_sigma=0',
  )
  errors.require(optim.peak_lr > 0, f'config.optim.peak_lr={optim.peak_lr} must be positive')
  errors.require(optim.eps > 0, f'config.optim.eps={optim.eps} must be positive')
  for name in ('beta1', 'beta2'):
    value = getattr(optim, name)
    errors.require(value < 1, f'config.optim.{name}={value} must lie in [0, 1)')
  bounds = optim.multi_step_boundaries
  errors.require(
    list(bounds) == sorted(set(bounds)) and all(0 < b < 1 for b in bounds),
    f'config.optim.multi_step_boundaries={bounds} must be rising shares of the run between 0 and '
    '1, none of them twice',
  )
  errors.require(
    optim.multi_step_factor > 0,
    f'config.optim.multi_step_factor={optim.multi_step_factor} must be positive; 1.0 leaves the '
    'rate as it is',
  )
  _validate_stages(optim, train)
  errors.require(
    optim.warmup_steps < max(train.num_steps, 1),
    f'config.optim.warmup_steps={optim.warmup_steps} must be smaller than '
    f'train.num_steps={train.num_steps}; '
    'lower it, or train longer',
  )


def _validate_stages(optim: schema.OptimConfig, train: schema.TrainConfig):
  name, shares = f'config.optim.stages={optim.stages}', [share for share, *_ in optim.stages]
  errors.require(
    bool(shares) == (optim.schedule == 'stages'),
    f"{name} is read by config.optim.schedule='stages', which needs it, and by no other; set both "
    'or neither',
  )
  for _, _, shape in optim.stages:
    errors.choice('optim.stages', shape, schema.STAGE_SHAPES)
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


def _validate_train(train: schema.TrainConfig):
  errors.at_least(train, 'train', 1, 'num_steps', 'batch_size', 'log_every', 'loss_chunk')
  errors.at_least(
    train,
    'train',
    0,
    'micro_batch_size',
    'seed',
    'z_loss_weight',
    'mtp_loss_weight',
    'max_skipped_steps',
    'stall_seconds',
    'eval_every',
    'routing_every',
    'sample_tokens',
  )
  errors.require(
    train.num_steps < 2**31,
    f'config.train.num_steps={train.num_steps} must be below 2^31, as 32 bits count the steps; '
    'choose a smaller number',
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
  errors.require(
    not steps or steps[-1] <= train.num_steps,
    f'config.train.batch_ramp={train.batch_ramp} must end by train.num_steps={train.num_steps}; '
    'drop the later entries, or train longer',
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
