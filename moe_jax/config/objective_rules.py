"""The rules of what the weights are trained for, section `objective`."""

from moe_jax import errors
from moe_jax.config import router_traits, schema

# Of an algorithm: (field that it does not read, the value at which that is no mistake, why).
_UNREAD = {
  'ppo': (
    ('std', 'sample', 'advantages are whitened over the batch, not divided by group'),
    ('kl', 'k3', 'the log-ratio to the reference is part of the rewards, not of the loss'),
    ('ratio', 'token', 'an advantage belongs to its token'),
    ('max_draws', 1, 'answers of equal rewards teach too'),
  ),
  'rft': (
    ('std', 'sample', 'an answer is right or not, and no advantage is divided'),
    ('ratio', 'token', 'its loss has no ratio'),
    ('clip_low', 0.2, 'its loss has no ratio that could be clipped'),
    ('clip_high', 0.2, 'its loss has no ratio that could be clipped'),
    ('dual_clip', 0.0, 'no answer has a negative advantage'),
    ('reward_model', '', 'which answers are right is said by `reward`, and no score is needed'),
  ),
}


def validate_start(config: schema.Config):
  """Checks that there is a run to inherit from, before what it would have brought is missed.

  Raises:
    errors.InputError: there is none.
  """
  errors.require(
    not config.objective.inherit or bool(config.init_from),
    "config.init_from='' must name the run to go on from, as config.objective.inherit=True takes "
    'its model; pass --config.init_from=WORKDIR, or set objective.inherit=False',
  )


def validate(config: schema.Config):
  """Checks the section `objective`, and what it asks of the others.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  objective, data = config.objective, config.data
  errors.choice('objective.kind', objective.kind, schema.OBJECTIVES)
  members = [data.source, *(member.source for member in data.mixture.values())]
  where = 'config.data.source' if data.source != 'mixture' else 'config.data.mixture'
  special = {
    'sft': schema.CONVERSATION_SOURCES,
    'dpo': schema.PREFERENCE_SOURCES,
    'policy': schema.CONVERSATION_SOURCES,
    'process_reward': schema.CONVERSATION_SOURCES,
  }
  named = ('mixture', *schema.CHAT_SOURCES)
  text = tuple(source for source in schema.SOURCES if source not in named)
  allowed = special.get(objective.kind, text)
  what = 'conversations' if objective.kind in special else 'text'
  what = 'preferences' if objective.kind == 'dpo' else what
  errors.require(
    all(source in allowed for source in members if source != 'mixture'),
    f'{where} with config.objective.kind={objective.kind!r} must name {what} only '
    f'({", ".join(map(repr, allowed))}), and has {", ".join(map(repr, members))}; conversations '
    "are for objective.kind='sft', 'policy' and 'process_reward', preferences for 'dpo'",
  )
  errors.require(
    objective.kind == 'next_token' or data.fim_rate == 0,
    f'config.data.fim_rate={data.fim_rate} rearranges documents of text, not conversations; set it '
    'to 0',
  )
  _validate_dpo(objective.dpo)
  _validate_policy(objective.policy)
  _validate_process_reward(objective.process_reward)
  if objective.kind in schema.OF_ANSWERS:
    _validate_tuned(config)
  if objective.kind == 'policy':
    _validate_rollouts(config)
  if objective.kind == 'process_reward':
    errors.require(
      bool(objective.process_reward.labels) and not config.train.batch_ramp,
      f'config.objective.process_reward.labels={objective.process_reward.labels!r} must name a '
      f'file of labelled steps, and config.train.batch_ramp={config.train.batch_ramp} be empty; '
      'write one with python -m experiments.process_reward label',
    )


def _validate_dpo(dpo: schema.DpoConfig):
  errors.choice('objective.dpo.loss', dpo.loss, schema.PREFERENCE_LOSSES)
  errors.require(
    dpo.beta > 0,
    f'config.objective.dpo.beta={dpo.beta} must be positive; 0.1 is usual, as without it nothing '
    'holds the model near its reference',
  )
  errors.require(
    0 <= dpo.label_smoothing < 0.5 and (dpo.loss == 'sigmoid' or not dpo.label_smoothing),
    f'config.objective.dpo.label_smoothing={dpo.label_smoothing} must lie in [0, 0.5), and be 0 '
    f'with objective.dpo.loss={dpo.loss!r}, which has no such term',
  )
  errors.require(
    dpo.sft_weight >= 0,
    f'config.objective.dpo.sft_weight={dpo.sft_weight} must not be negative; 0 leaves the term out',
  )


def _validate_policy(policy: schema.PolicyConfig):
  """The values of `objective.policy` by themselves."""
  where = 'objective.policy'
  for name, known in (
    ('algorithm', schema.POLICY_ALGORITHMS),
    ('supervision', schema.POLICY_SUPERVISION),
    ('std', schema.POLICY_STD),
    ('aggregation', schema.POLICY_AGGREGATIONS),
    ('ratio', schema.POLICY_RATIOS),
    ('truncated', schema.POLICY_TRUNCATED),
    ('replay', schema.REPLAYS),
  ):
    errors.choice(f'{where}.{name}', getattr(policy, name), known)
  errors.require(
    policy.kl in schema.POLICY_KLS,
    f"config.{where}.kl={policy.kl!r} must be 'k2' or 'k3': the gradient of 'k1', log p - log q, "
    'is 0 in the mean and does not hold the reference q, so it keeps a policy near nothing',
  )
  errors.at_least(policy, where, 1, 'prompts', 'updates', 'max_new_tokens', 'max_draws')
  errors.at_least(
    policy, where, 0, 'rows', 'kl_weight', 'reference_every', 'dual_clip', 'eval_questions'
  )
  errors.require(
    policy.group_size >= (1 if policy.algorithm == 'ppo' else 2),
    f'config.{where}.group_size={policy.group_size} must be at least 2: an advantage compares the '
    "answers to one question (8 to 64 are usual); with algorithm='ppo' 1 is enough",
  )
  errors.require(
    policy.temperature > 0,
    f'config.{where}.temperature={policy.temperature} must be positive, as answers that are all '
    'alike teach nothing; 1 is usual',
  )
  errors.require(
    0 < policy.clip_low < 1 and policy.clip_high > 0,
    f'config.{where}.clip_low={policy.clip_low} must lie in (0, 1) and clip_high='
    f'{policy.clip_high} above 0; 0.2 and 0.2 are usual',
  )
  errors.require(
    policy.dual_clip == 0 or policy.dual_clip > 1,
    f'config.{where}.dual_clip={policy.dual_clip} must be above 1 (3 is usual), or 0 to be off',
  )
  errors.require(
    policy.reward_seconds > 0,
    f'config.{where}.reward_seconds={policy.reward_seconds} must be positive',
  )
  _validate_ppo(policy)
  _validate_unread(policy)
  errors.require(
    policy.algorithm != 'rft' or policy.supervision == 'outcome',
    f"config.{where}.supervision={policy.supervision!r} must be 'outcome' with algorithm="
    f'{policy.algorithm!r}, which learns whole answers that are right',
  )


def _validate_ppo(policy: schema.PolicyConfig):
  """The section `ppo` by itself, and what needs its value head."""
  ppo, where = policy.ppo, 'objective.policy.ppo'
  for name in ('gamma', 'gae_lambda'):
    value = getattr(ppo, name)
    errors.require(
      0 <= value <= 1,
      f'config.{where}.{name}={value} must lie in [0, 1]; gamma=1 and gae_lambda=0.95 are usual',
    )
  errors.at_least(ppo, where, 0, 'value_clip', 'value_warmup')
  errors.require(
    ppo.value_weight > 0 and ppo.value_rate > 0,
    f'config.{where}.value_weight={ppo.value_weight} and value_rate={ppo.value_rate} must be '
    'positive, or no value is learned; 0.1 and 10 are usual',
  )
  if policy.algorithm != 'ppo':
    errors.require(
      policy.truncated != 'bootstrap',
      "config.objective.policy.truncated='bootstrap' needs a value of the last state, which "
      f"algorithm={policy.algorithm!r} does not learn; take 'keep' or 'leave_out', or 'ppo'",
    )


def _validate_unread(policy: schema.PolicyConfig):
  """What is set although the algorithm does not read it."""
  where = 'config.objective.policy'
  for name, neutral, why in _UNREAD.get(policy.algorithm, ()):
    value = getattr(policy, name)
    errors.require(
      value == neutral,
      f'{where}.{name}={value!r} is not read by algorithm={policy.algorithm!r}: {why}; leave it at '
      f'{neutral!r}',
    )
  errors.require(
    not policy.reference_every or policy.kl_weight > 0,
    f'{where}.reference_every={policy.reference_every} is not read with kl_weight=0: no reference '
    'is kept that could be renewed; leave it at 0, or set kl_weight (0.04 in the paper)',
  )


def _validate_process_reward(process: schema.ProcessRewardConfig):
  where = 'objective.process_reward'
  errors.choice(f'{where}.target', process.target, schema.LABEL_TARGETS)
  errors.require(
    bool(process.step_token) and process.good != process.bad,
    f'config.{where}.step_token={process.step_token!r} must name a special token, and good='
    f"{process.good!r} and bad={process.bad!r} differ; for example '+' and '-'",
  )
  errors.require(
    process.target == 'hard' or not process.outcome,
    f'config.{where}.target={process.target!r} is not read with outcome=True, whose one label is '
    "whether the solution is right; leave it at 'hard', or set outcome=False",
  )


def _validate_tuned(config: schema.Config):
  """What losses of a trained model's answers ask of a run."""
  kind = config.objective.kind
  errors.require(
    bool(config.init_from),
    f"config.init_from='' must name the run that objective.kind={kind!r} starts from, as its "
    'weights are the reference; pass --config.init_from=WORKDIR',
  )
  errors.require(
    not config.model.num_mtp_layers,
    f'config.model.num_mtp_layers={config.model.num_mtp_layers} must be 0 with '
    f'objective.kind={kind!r}, which does not train multi-token prediction; set it to 0, and the '
    'run starts without the modules of init_from',
  )
  errors.require(
    not config.train.z_loss_weight,
    f'config.train.z_loss_weight={config.train.z_loss_weight} must be 0 with '
    f'objective.kind={kind!r}, whose loss has no such term; set it to 0',
  )
  moe = config.model.moe
  errors.require(
    not config.model.is_moe
    or (moe.capacity.policy == 'none' and router_traits.of(moe).bound is None),
    f'config.model.moe.capacity.policy={moe.capacity.policy!r} with router={moe.router!r} leaves '
    f'tokens out by what else is in the batch, so that objective.kind={kind!r} would compare '
    "log-probabilities of other computations; set policy='none' and a router without a bound",
  )
  factor = moe.exchange.buffer_factor
  errors.require(
    not config.model.is_moe or not factor or config.mesh.expert == 1,
    f'config.model.moe.exchange.buffer_factor={factor} with mesh.expert={config.mesh.expert} does '
    f'not compute what overflows, by what else is in the batch, so that objective.kind={kind!r} '
    'would compare log-probabilities of other computations; set buffer_factor=0, or mesh.expert=1',
  )
  if kind in ('dpo', 'policy') and config.model.is_moe:
    _validate_one_model(config)


def _validate_one_model(config: schema.Config):
  """What is learned and what it is compared with, or sampled from, must be one model."""
  kind, moe = config.objective.kind, config.model.moe
  errors.require(
    not (moe.options.input_jitter or moe.options.random_second_expert),
    f'config.model.moe.options.input_jitter={moe.options.input_jitter} and random_second_expert='
    f'{moe.options.random_second_expert} must be off with objective.kind={kind!r}: training would '
    'compare with log-probabilities of another model; set 0 and False',
  )
  traits = router_traits.of(moe)
  replayed = kind == 'policy' and config.objective.policy.replay != 'none' and traits.ranked
  steady = [name for name, one in router_traits.known().items() if one.steady(moe)]
  ways = f'take router {" or ".join(map(repr, steady))}'
  if 'inference' in traits.options:
    ways += ", or model.moe.options.inference='all'"
  errors.require(
    replayed or traits.steady(moe),
    f'config.model.moe.router={moe.router!r} chooses otherwise in training than outside of it, or '
    f'by what else the batch holds, so that objective.kind={kind!r} would compare '
    f'log-probabilities of two models; {ways}',
  )


def _validate_rollouts(config: schema.Config):
  """What answers that are written while a run trains ask of it."""
  policy, moe = config.objective.policy, config.model.moe
  where = 'config.objective.policy'
  errors.require(
    policy.max_new_tokens < config.model.max_seq_len,
    f'{where}.max_new_tokens={policy.max_new_tokens} must leave room for a question in '
    f'config.model.max_seq_len={config.model.max_seq_len}; ask for fewer',
  )
  every = config.checkpoint.save_every
  errors.require(
    every % policy.updates == 0,
    f'config.checkpoint.save_every={every} must be a multiple of objective.policy.updates='
    f'{policy.updates}: a run goes on at the beginning of an iteration, as its answers are not '
    'kept',
  )
  errors.require(
    config.train.num_steps % policy.updates == 0,
    f'config.train.num_steps={config.train.num_steps} must be a multiple of '
    f'objective.policy.updates={policy.updates}; make it whole iterations',
  )
  errors.require(
    not config.train.batch_ramp,
    f'config.train.batch_ramp={config.train.batch_ramp} must be empty with objective.kind='
    "'policy', whose batches are the answers of an iteration",
  )
  warmup = policy.ppo.value_warmup * policy.updates
  errors.require(
    policy.algorithm != 'ppo' or warmup < config.train.num_steps,
    f'{where}.ppo.value_warmup={policy.ppo.value_warmup} iterations are {warmup} steps, in which '
    f'the policy rests, and config.train.num_steps={config.train.num_steps} has no more; warm up '
    'for fewer',
  )
  if not config.model.is_moe:
    return
  traits = router_traits.of(moe)
  errors.require(
    traits.causal,
    f"config.model.moe.router={moe.router!r} has no causal decoding, and objective.kind='policy' "
    'writes answers token by token; use a router whose tokens choose experts',
  )
  errors.require(
    policy.replay == 'none' or traits.ranked,
    f'{where}.replay={policy.replay!r} needs a router whose tokens choose K experts each, and '
    f"config.model.moe.router={moe.router!r} does not; set replay='none'",
  )
