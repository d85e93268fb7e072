"""GRPO: a tuned run learns from the rewards of answers that it writes itself.

Run:    python -m experiments.train --config=configs/reasoner.py --workdir=runs/reasoner
        python -m experiments.rl --config=configs/grpo.py --config.init_from=runs/reasoner \
          --workdir=runs/grpo
Takes:  half an hour on 2 CPU cores that do other work too.
Expect: not known; no gain was shown in four short trials (docs/topics/reinforcement.md).
Own data: --config.data.source=conversations --config.data.path=questions.jsonl

The model is that of `init_from`, without balance losses and with its expert bias at rest. The
paper's rate (1e-6, DeepSeekMath 7B) is for a model of billions; one of some million parameters
takes 1e-4.
"""

from configs import base, recipes


def _process(config):
  """A reward at the end of every step, by the checker of sums."""
  config.objective.policy.reward = 'steps'
  config.objective.policy.supervision = 'process'


def _rft(config):
  """Online rejection fine-tuning: right answers are learned, wrong ones are not unlearned."""
  config.objective.policy.algorithm = 'rft'


def _gspo(config):
  """Ratios of whole answers, clipped narrowly (arXiv 2507.18071)."""
  config.objective.policy.ratio = 'sequence'
  config.objective.policy.clip_low = 3e-4
  config.objective.policy.clip_high = 4e-4


def _programs(config):
  """Small programs, run against hidden tests; for a start from configs/reasoner.py:programs."""
  config.data.source = 'programs'
  config.data.path = '?operations=2&max_value=9&kinds=2&problems=40000'
  config.objective.policy.reward = 'program'
  config.objective.policy.max_new_tokens = 120
  config.objective.policy.reward_seconds = 30.0  # the sandbox has limits of its own, below that


VARIANTS = {'programs': _programs, 'process': _process, 'rft': _rft, 'gspo': _gspo}


def get_config(variant=''):
  """Sums, as `reasoner` has them; the variants differ in task or objective."""
  config = base.get_config()
  config.objective.kind = 'policy'
  config.objective.inherit = True
  config.objective.balance = False
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
  config.train.eval_every = 25
  config.checkpoint.save_every = 25
  return recipes.variant(config, variant, VARIANTS)
