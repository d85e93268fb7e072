"""A judge of steps: the probability that a solution so far can still become right (Math-Shepherd).

Run:    python -m experiments.process_reward label --workdir=runs/reasoner --out=runs/labels.jsonl
        python -m experiments.process_reward train --config=configs/process_reward.py \
          --config.init_from=runs/reasoner \
          --config.objective.process_reward.labels=runs/labels.jsonl --workdir=runs/prm
Takes:  minutes on 2 CPU cores that do other work too.
Expect: `:small`, five seeds: area under the curve 0.73 for labels of held-out steps, 0.59 for true
        steps, 0.55 for solutions (`:small_outcome`); worse than votes (experiments/reinforcement).

The model is that of `init_from`. `:outcome` judges the whole solution (ORM).
"""

from configs import base, recipes


def _outcome(config):
  """One label at the end of a solution, whether it is right."""
  config.objective.process_reward.outcome = True


def _small(config):
  """The small sums of configs/reasoner.py:small, for a few thousand labelled solutions."""
  recipes.small_sums(config)
  config.data.heldout_fraction = 0.2  # more than that of the run: it alone is of labelled questions
  config.train.num_steps = 250
  config.train.batch_size = 24


def _small_outcome(config):
  """`:small`, one label at the end of a solution."""
  _small(config)
  _outcome(config)


VARIANTS = {'outcome': _outcome, 'small': _small, 'small_outcome': _small_outcome}


def get_config(variant=''):
  """Hard labels; `:outcome` has one per solution."""
  config = base.get_config()
  config.objective.kind = 'process_reward'
  config.objective.inherit = True
  config.objective.balance = False
  config.objective.process_reward.labels = 'runs/labels.jsonl'
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=50&operations=3&problems=40000'
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.1
  config.optim.peak_lr = 5e-4
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 10
  config.optim.weight_decay = 0.0
  config.train.num_steps = 150
  config.train.batch_size = 8
  config.train.z_loss_weight = 0.0
  config.train.sample_prompt = ''
  config.train.log_every = 10
  config.train.eval_every = 0
  config.checkpoint.save_every = 50
  return recipes.variant(config, variant, VARIANTS)
