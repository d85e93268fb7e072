import pytest

from moe_jax import errors
from moe_jax.config import schema
from tests import tiny
from tests.training.test_policy_loss import RUN


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'policy__kl': 'k1'}, "kl='k1' must be 'k2' or 'k3'"),
    ({'policy__group_size': 1}, 'group_size=1 must be at least 2'),
    ({'policy__temperature': 0.0}, 'temperature=0.0 must be positive'),
    ({'policy__clip_low': 1.0}, 'clip_low=1.0'),
    ({'policy__clip_high': 0.0}, 'clip_high=0.0'),
    ({'policy__dual_clip': 0.5}, 'dual_clip=0.5'),
    ({'policy__reward_seconds': 0.0}, 'reward_seconds=0.0'),
    ({'policy__aggregation': 'mean'}, "aggregation='mean' must be one of"),
    ({'policy__updates': 0}, 'updates=0 must be at least 1'),
    ({'policy__algorithm': 'rft', 'policy__supervision': 'process'}, "supervision='process'"),
    ({'policy__ppo__gamma': 1.1}, 'ppo.gamma=1.1 must lie in'),
    ({'policy__ppo__gae_lambda': -0.1}, 'ppo.gae_lambda=-0.1 must lie in'),
    ({'policy__ppo__value_weight': 0.0}, 'value_weight=0.0'),
    ({'policy__ppo__value_rate': -1.0}, 'value_rate=-1.0'),
    ({'policy__ppo__value_clip': -0.2}, 'value_clip=-0.2 must be at least 0'),
    ({'policy__ppo__value_warmup': -1}, 'value_warmup=-1 must be at least 0'),
    ({'policy__truncated': 'bootstrap'}, "truncated='bootstrap' needs a value"),
    ({'policy__algorithm': 'ppo', 'policy__std': 'none'}, "std='none' is not read"),
    ({'policy__algorithm': 'ppo', 'policy__kl': 'k2'}, "kl='k2' is not read"),
    ({'policy__algorithm': 'ppo', 'policy__ratio': 'sequence'}, "ratio='sequence' is not read"),
    ({'policy__algorithm': 'ppo', 'policy__max_draws': 2}, 'max_draws=2 is not read'),
    ({'policy__algorithm': 'ppo', 'policy__group_size': 0}, 'group_size=0'),
    ({'policy__algorithm': 'rft', 'policy__std': 'none'}, "std='none' is not read"),
    ({'policy__algorithm': 'rft', 'policy__ratio': 'sequence'}, "ratio='sequence' is not read"),
    ({'policy__algorithm': 'rft', 'policy__clip_low': 0.1}, 'clip_low=0.1 is not read'),
    ({'policy__algorithm': 'rft', 'policy__clip_high': 0.28}, 'clip_high=0.28 is not read'),
    ({'policy__algorithm': 'rft', 'policy__dual_clip': 3.0}, 'dual_clip=3.0 is not read'),
    ({'policy__algorithm': 'rft', 'policy__reward_model': 'prm'}, "reward_model='prm' is not read"),
    ({'policy__reference_every': 2, 'policy__kl_weight': 0.0}, 'reference_every=2 is not read'),
    (
      {'process_reward__target': 'soft', 'process_reward__outcome': True},
      "target='soft' is not read with outcome=True",
    ),
  ],
)
def test_values_are_refused_whatever_the_objective(changes, words):
  for base in ({}, RUN):
    changed = base | {f'objective__{key}': value for key, value in changes.items()}
    with pytest.raises(errors.InputError, match=words.replace('[', r'\\[')):
      tiny.make(**changed)


BUFFERS = {'model__moe__exchange__buffer_factor': 1.5}
NO_REPLAY = {'objective__policy__replay': 'none'}
DENSE_TRAINING = {
  'model__moe__router': 'ds_moe',
  'model__moe__dispatch': 'dense',
  'model__moe__options__inference': 'topk',
}


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'init_from': ''}, "config.init_from=''"),
    ({'objective__policy__max_new_tokens': 16}, 'max_new_tokens=16'),
    ({'objective__policy__updates': 3}, 'save_every'),
    (
      {'objective__policy__updates': 4, 'checkpoint__save_every': 4, 'train__num_steps': 6},
      'num_st',
    ),
    ({'train__batch_ramp': ((2, 16),)}, 'batch_ramp'),
    ({'model__moe__router': 'expert_choice'}, 'router'),
    ({'model__moe__options__input_jitter': 0.1}, 'input_jitter=0.1'),
    ({'model__moe__capacity__policy': 'score'}, "'score' with router='topk' leaves tokens out"),
    (BUFFERS | {'mesh__expert': 2}, 'buffer_factor=1.5 with mesh.expert=2 does not compute what'),
    (BUFFERS | {'mesh__expert': -1, 'mesh__data': 1}, 'buffer_factor=1.5 with mesh.expert=-1'),
    ({'model__moe__options__random_second_expert': True}, 'random_second_expert=True must be off'),
    (
      NO_REPLAY | {'model__moe__router': 'sinkhorn'},
      "router='sinkhorn' chooses otherwise in training",
    ),
    (NO_REPLAY | {'model__moe__router': 'balanced'}, "router='balanced' chooses otherwise"),
    (NO_REPLAY | DENSE_TRAINING, "two models; take router 'topk' or 'hash', or .*inference='all'"),
    ({'model__num_mtp_layers': 1}, "num_mtp_layers=1 must be 0 with objective.kind='policy'"),
    ({'data__source': 'synthetic'}, 'must name conversations'),
    ({'train__z_loss_weight': 1e-4}, "z_loss_weight=0.0001 must be 0 with .*kind='policy'"),
  ],
)
def test_a_run_of_rewards_refuses_what_it_cannot_do(changes, words):
  tiny.make(**RUN)
  with pytest.raises(errors.InputError, match=words):
    tiny.make(**(RUN | changes))


@pytest.mark.parametrize('kind', schema.OF_ANSWERS)
def test_answers_are_computed_whole_on_an_expert_mesh(kind):
  """Fine are buffers that hold everything, no expert axis, and small ones of another loss."""
  changes = RUN | {'objective__kind': kind, 'objective__process_reward__labels': 'labels.jsonl'}
  changes |= {'data__source': 'preferences' if kind == 'dpo' else 'arithmetic', 'data__path': ''}
  tiny.make(**changes | {'mesh__expert': 2})
  tiny.make(**changes | BUFFERS)
  tiny.make(**BUFFERS | {'mesh__expert': 2})
  with pytest.raises(errors.InputError, match=f"buffer_factor=1.5 .* objective.kind='{kind}'"):
    tiny.make(**changes | BUFFERS | {'mesh__expert': 2})


def test_replayed_choices_make_one_model_of_two():
  tiny.make(**RUN | {'model__moe__router': 'sinkhorn', 'objective__policy__replay': 'rollout'})
  tiny.make(**RUN | NO_REPLAY | DENSE_TRAINING | {'model__moe__options__inference': 'all'})


def test_ppo_does_with_one_answer_to_a_question_and_warms_up_for_less_than_the_run():
  ppo = RUN | {'objective__policy__algorithm': 'ppo', 'objective__policy__group_size': 1}
  tiny.make(**ppo, objective__policy__truncated='bootstrap')
  few = ppo | {'train__num_steps': 6, 'checkpoint__save_every': 2, 'objective__policy__updates': 2}
  tiny.make(**few, objective__policy__ppo__value_warmup=2)
  with pytest.raises(errors.InputError, match='value_warmup=3 iterations are 6 steps'):
    tiny.make(**few, objective__policy__ppo__value_warmup=3)
