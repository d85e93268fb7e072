"""Direct preference optimisation: a tuned run learns which of two answers is preferred.

Run:    python -m experiments.train --config=configs/sft.py --config.init_from=runs/quickstart \
          --workdir=runs/sft
        python -m experiments.make_pairs --workdir=runs/sft --out=runs/pairs.jsonl
        python -m experiments.train --config=configs/dpo.py --config.init_from=runs/sft \
          --config.data.path=runs/pairs.jsonl --workdir=runs/dpo
        python -m experiments.answers --workdir=runs/dpo --like=runs/sft
Takes:  3 minutes for the pairs and 4 for the training on 2 cores that do other work too.
Expect: 62 % of the held-out pairs in order; 31 of 256 questions right, 38 before (docs).

The model is that of `init_from`, which is the reference too. The rates of papers are for models of
billions (5e-7 to 5e-6); a model of some million parameters takes 1e-4.
"""

from configs import base


def get_config():
  """Pairs of answers out of `data.path`."""
  config = base.get_config()
  config.objective.kind = 'dpo'
  config.objective.inherit = True
  config.objective.balance = False
  config.data.source = 'preferences'
  config.data.path = 'runs/pairs.jsonl'
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.1
  config.optim.peak_lr = 1e-4
  config.optim.schedule = 'linear'
  config.optim.warmup_steps = 10
  config.optim.weight_decay = 0.0
  config.train.num_steps = 100
  config.train.batch_size = 8
  config.train.z_loss_weight = 0.0
  config.train.sample_prompt = ''
  config.train.log_every = 5
  config.train.eval_every = 25
  config.checkpoint.save_every = 50
  return config
