"""PPO: a tuned run learns from rewards of its own answers, with a value head that expects them.

Run:    python -m experiments.train --config=configs/reasoner.py --workdir=runs/reasoner
        python -m experiments.rl --config=configs/ppo.py --config.init_from=runs/reasoner \
          --workdir=runs/ppo
Takes:  30 iterations of `:small` or `:small_process`, of 256 answers each, 90 s of an idle core.
Expect: of these, over five seeds, drawn answers right by outcome +0.2 points [-1.2, +1.7], step by
        step +2.9 [-0.7, +6.6] (experiments/reinforcement).
Step by step, with a judge: --config=configs/ppo.py:process \
          --config.objective.policy.reward_model=runs/prm (experiments.process_reward train)

Math-Shepherd (arXiv 2312.08935) gives its distance to the reference (0.04) and no more; gamma 1 and
lambda 0.95 are what the field has. Two updates on the answers of an iteration: with one the ratio
is 1 and nothing is clipped.
"""

from configs import base, recipes


def _process(config):
  """Step by step: a reward at the end of every step, by the checker of sums."""
  config.objective.policy.reward = 'steps'
  config.objective.policy.supervision = 'process'


def _small(config):
  """The small sums and the budget of configs/grpo.py, from configs/reasoner.py:small."""
  recipes.small_sums(config)
  config.objective.policy.max_new_tokens = 48
  config.objective.policy.kl_weight = 0.0
  config.optim.peak_lr = 3e-4
  config.optim.schedule = 'cosine'
  config.optim.final_lr_fraction = 0.05
  config.optim.warmup_steps = 10  # the policy rests for as long: `value_warmup` of two steps each
  config.train.num_steps = 240  # 120 iterations
  config.train.batch_size = config.train.micro_batch_size = 32
  config.train.eval_every = 80
  config.checkpoint.save_every = 80


def _small_process(config):
  """`:small`, step by step."""
  _small(config)
  _process(config)


VARIANTS = {'process': _process, 'small': _small, 'small_process': _small_process}


def get_config(variant=''):
  """Sums, as `reasoner` has them, and the reward of an answer at its last token."""
  config = base.get_config()
  config.objective.kind = 'policy'
  config.objective.inherit = True
  config.objective.balance = False
  config.objective.policy.algorithm = 'ppo'
  config.objective.policy.updates = 2
  config.objective.policy.aggregation = 'token_mean'
  config.objective.policy.truncated = 'bootstrap'
  config.objective.policy.ppo.value_warmup = 5
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=50&operations=3&problems=40000'
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.05
  config.optim.peak_lr = 1e-4
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 5
  config.optim.weight_decay = 0.0
  config.train.num_steps = 100
  config.train.batch_size = 8
  config.train.z_loss_weight = 0.0
  config.train.sample_prompt = ''
  config.train.log_every = 1
  config.train.eval_every = 20
  config.checkpoint.save_every = 20
  return recipes.variant(config, variant, VARIANTS)
