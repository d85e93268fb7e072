import pytest

from moe_jax import errors
from moe_jax.config import moe_config, parse
from tests import tiny
from tests.config import changes

# (overrides, what the message must hold: the field with its value, the rule, a way out).
AT_LEAST_1 = [
  *(f'model.{n}' for n in ('vocab_size', 'max_seq_len', 'embed_dim', 'mlp_dim', 'num_layers')),
  *('model.num_heads', 'model.attention.num_kv_heads', 'model.attention.head_dim'),
  *('model.moe.num_experts_per_tok', 'model.moe.moe_mlp_dim'),
  *('model.moe.num_expert_groups', 'model.moe.num_virtual_devices'),
  *('data.prefetch', 'data.synthetic_documents'),
  *('train.num_steps', 'train.batch_size', 'train.log_every'),
  *('checkpoint.save_every', 'checkpoint.keep_last'),
]
AT_LEAST_0 = [
  *('model.num_dense_layers', 'model.norm_eps', 'model.init_std'),
  *('model.moe.num_shared_experts', 'model.moe.num_limited_groups'),
  *(f'model.moe.options.{n}' for n in ('logit_norm_scale', 'chunk_tokens', 'replay_rows')),
  *('model.moe.options.inference_threshold', 'model.moe.expert_bias.update_rate'),
  *(f'model.moe.balance.{name}.weight' for name in moe_config.LOSSES),
  *(f'model.moe.balance.adaptive.{n}' for n in ('slope', 'max_coefficient', 'capacity_factor')),
  *('model.moe.capacity.group_rows', 'train.routing_every'),
  *(f'optim.{n}' for n in ('warmup_steps', 'final_lr_fraction', 'weight_decay', 'clip_norm')),
  *('optim.beta1', 'optim.beta2'),
  *('train.micro_batch_size', 'train.seed', 'train.z_loss_weight', 'train.eval_every'),
  *('train.sample_tokens', 'checkpoint.keep_every', 'paper.mlp_dim', 'paper.moe_mlp_dim'),
]


@pytest.mark.parametrize(
  'minimum, path', [(1, p) for p in AT_LEAST_1] + [(0, p) for p in AT_LEAST_0]
)
def test_minima(minimum, path):
  now = tiny.values()
  for key in path.split('.'):
    now = now[key]
  value = -0.5 if isinstance(now, float) else minimum - 1
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(changes.change(path, value))
  assert f'config.{path}={value}' in str(error.value)
  assert f'at least {minimum}' in str(error.value)


@pytest.mark.parametrize('steps', [2**31, 5 * 10**9])
def test_steps_are_counted_in_32_bits(steps):
  parse.from_dict(changes.change('train.num_steps', 2**31 - 1))
  changes.assert_refused({'train__num_steps': steps}, [f'num_steps={steps}', 'below 2^31'])


@pytest.mark.parametrize(
  'path',
  [
    *('model.dtype', 'model.param_dtype', 'model.remat', 'model.moe.router', 'model.moe.dispatch'),
    *('model.moe.grouped_matmul', 'model.moe.score_func', 'model.moe.group_score'),
    *('model.moe.options.hash_table', 'model.moe.options.inference'),
    *('model.moe.expert_bias.update_rule', 'model.moe.expert_bias.form'),
    *(f'model.moe.balance.{name}.scope' for name in moe_config.LOSSES),
    *('model.moe.balance.adaptive.loss', 'model.moe.capacity.policy'),
    *('data.source', 'optim.schedule'),
  ],
)
def test_choices_list_what_there_is(path):
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(changes.change(path, 'zzz'))
  assert f"config.{path}='zzz' must be one of " in str(error.value)


MIXTURE = {'data__source': 'mixture'}


@pytest.mark.parametrize(
  'overrides, parts',
  [
    (
      {'model__attention__num_kv_heads': 3},
      ('model.attention.num_kv_heads=3', 'must divide', 'num_heads=2', 'choose a divisor of 2'),
    ),
    (
      {'model__attention__head_dim': 7},
      ('model.attention.head_dim=7', 'must be even', 'choose 8'),
    ),
    ({'model__attention__rope__theta': 1.0}, ('model.attention.rope.theta=1.0', 'above 1')),
    (
      {'model__moe__num_experts_per_tok': 9},
      ('num_experts_per_tok=9', 'must not exceed', 'num_experts=8', 'choose at most 8'),
    ),
    (
      {'model__num_dense_layers': 3},
      ('num_dense_layers=3', 'num_layers=3', 'lower it', 'num_experts=0'),
    ),
    ({'model__moe__num_experts': -1}, ('num_experts=-1', 'must be 0', 'or positive')),
    ({'mesh__data': 0}, ('mesh.data=0', 'number of devices', '-1')),
    ({'mesh__data': -2}, ('mesh.data=-2', 'number of devices', '-1')),
    ({'data__heldout_fraction': 1.5}, ('data.heldout_fraction=1.5', 'between 0 and 1')),
    ({'data__heldout_fraction': 0.0}, ('data.heldout_fraction=0.0', 'between 0 and 1')),
    ({'data__heldout_fraction': 1.0}, ('data.heldout_fraction=1.0', 'strictly between')),
    ({'data__fim_rate': -0.1}, ('data.fim_rate=-0.1', 'between 0 and 1')),
    ({'data__source': 'text'}, ("data.path=''", "data.source='text'", 'must name a file')),
    (MIXTURE, ('data.mixture={}', 'must name at least one component')),
    (
      MIXTURE | {'data__mixture': {'code': changes.part()}, 'data__path': 'a.txt'},
      ("data.path='a.txt'", 'would ignore it', 'data.mixture.LABEL.path'),
    ),
    (
      {'data__mixture': {'code': changes.part()}},
      ('data.mixture is set', "data.source='python_source'", "set data.source='mixture'"),
    ),
    (
      MIXTURE | {'data__mixture': {'code': changes.part(source='mixture')}},
      ("data.mixture.code.source='mixture'", 'must be one of'),
    ),
    (
      MIXTURE | {'data__mixture': {'code': changes.part(weight=0.0)}},
      ('data.mixture.code.weight=0.0', 'positive', 'drop the component'),
    ),
    (
      MIXTURE | {'data__mixture': {'code': changes.part(path='')}},
      ("data.mixture.code.path=''", 'must name a file', "'text'"),
    ),
    ({'optim__schedule': 'stages'}, ('optim.stages=()', 'set both')),
    ({'optim__stages': ((1.0, 1.0, 'cosine'),)}, ('optim.stages=', 'set both')),
    (
      {'optim__schedule': 'stages', 'optim__stages': ((0.9, 1.0, 'cosine'),)},
      ('optim.stages=', 'rise to 1.0'),
    ),
    (
      {'optim__schedule': 'stages', 'optim__stages': ((1.0, 1.0, 'step'),)},
      ('optim.stages', "'step'"),
    ),
    ({'optim__peak_lr': 0.0}, ('optim.peak_lr=0.0', 'positive')),
    ({'optim__peak_lr': float('nan')}, ('optim.peak_lr=nan', 'finite')),
    ({'optim__eps': 0.0}, ('optim.eps=0.0', 'positive')),
    ({'optim__beta2': 1.0}, ('optim.beta2=1.0', '[0, 1)')),
    (
      {'optim__moment_dtype': 'bfloat16', 'optim__beta1': 0.9, 'optim__beta2': 0.995},
      ("optim.moment_dtype='bfloat16'", 'beta2=0.995', 'must not exceed 0.99', "'float32'"),
    ),
    (
      {'optim__multi_step_boundaries': (0.9, 0.8)},
      ('optim.multi_step_boundaries=(0.9, 0.8)', 'rising shares'),
    ),
    ({'optim__multi_step_boundaries': (0.5, 0.5)}, ('(0.5, 0.5)', 'none of them twice')),
    ({'optim__multi_step_factor': -1.0}, ('multi_step_factor=-1.0', 'positive')),
    ({'train__batch_ramp': ((21, 4),)}, ('((21, 4),)', 'end by train.num_steps=20')),
    ({'optim__multi_step_boundaries': (0.5, 1.0)}, ('(0.5, 1.0)', 'between 0 and 1')),
    (
      {'optim__warmup_steps': 20},
      ('optim.warmup_steps=20', 'train.num_steps=20', 'lower it, or train longer'),
    ),
    (
      {'train__batch_ramp': ((5, 2), (3, 4))},
      ('train.batch_ramp=((5, 2), (3, 4))', '(until step, batch size)', 'rise'),
    ),
    ({'train__batch_ramp': ((0, 2),)}, ('train.batch_ramp=((0, 2),)', 'positive')),
    ({'train__batch_ramp': ((3, 0),)}, ('train.batch_ramp=((3, 0),)', 'positive batch sizes')),
    (
      {'train__micro_batch_size': 3},
      ('train.micro_batch_size=3', 'must divide', '8', 'choose a divisor of 8, or 0'),
    ),
    (
      {'train__micro_batch_size': 4, 'train__batch_ramp': ((3, 6),)},
      ('train.micro_batch_size=4', '6', 'choose a divisor of 6, or 0'),
    ),
  ],
)
def test_rules(overrides, parts):
  changes.assert_refused(overrides, parts)


# Names of files, columns and tokens, and prompts.
FREE = ('path', 'tokenizer', '_token', '_field', 'cache_dir', 'init_from', 'sample_prompt')
FREE += ('chat_template', 'expert_config', 'reward', 'reward_model', 'labels', 'good', 'bad')


def test_every_choice_refuses_another_word():
  def words(section, path=()):
    for key, value in section.items():
      if isinstance(value, dict):
        yield from words(value, (*path, key))
      elif isinstance(value, str) and not key.endswith(FREE):
        yield '.'.join((*path, key))

  fields = list(words(tiny.values()))
  assert len(fields) > 25 and 'optim.moment_dtype' in fields
  for field in fields:
    with pytest.raises(errors.InputError) as error:
      parse.from_dict(changes.change(field, 'nonsense'))
    assert f"{field}='nonsense'" in str(error.value), field


EXPERTS = {'init_from': 'base', 'trainable__kind': 'experts'}


@pytest.mark.parametrize(
  'overrides, parts',
  [
    ({'trainable__kind': 'lora'}, ("config.init_from=''", 'pass --config.init_from=WORKDIR')),
    ({'trainable__lora_rank': 0}, ('trainable.lora_rank=0', 'at least 1')),
    ({'trainable__lora_alpha': 0.0}, ('trainable.lora_alpha=0.0', 'positive')),
    (
      {'trainable__shared_experts': True},
      (
        "trainable.kind='all' would ignore trainable.shared_experts,",
        "set trainable.kind='experts'",
      ),
    ),
    (
      {'trainable__experts': [[1], [2]], 'trainable__non_expert_modules': True},
      ('would ignore trainable.experts and trainable.non_expert_modules,',),
    ),
    (EXPERTS | {'init_from': ''}, ("config.init_from=''", 'pass --config.init_from=WORKDIR')),
    (EXPERTS | {'model__moe__num_experts': 0}, ('num_experts=0', "kind='all'")),
    (EXPERTS, ('trainable.expert_config', 'each of the 2 MoE layers', 'experiments.esft')),
    (EXPERTS | {'trainable__experts': [[1], [8]]}, ('different experts below 8',)),
    (EXPERTS | {'trainable__experts': [[1, 1], []]}, ('different experts below 8',)),
    (EXPERTS | {'trainable__experts': [[], []]}, ('trains nothing', 'esft select')),
  ],
)
def test_what_is_trained_must_be_there(overrides, parts):
  changes.assert_refused(overrides, parts)
  accepted = tiny.make(**EXPERTS, trainable__experts=((1, 7), ()))
  assert accepted.trainable.experts == ((1, 7), ())
