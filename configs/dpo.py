"""Direct preference optimisation: a tuned run learns which of two answers is preferred.

Run:    python -m experiments.train --config=configs/reasoner.py --workdir=runs/reasoner
        python -m experiments.make_pairs --workdir=runs/reasoner --out=runs/pairs.jsonl
        python -m experiments.train --config=configs/dpo.py --config.init_from=runs/reasoner \
          --config.data.path=runs/pairs.jsonl --workdir=runs/dpo
        python -m experiments.answers --workdir=runs/dpo --like=runs/reasoner
Takes:  3 minutes for the pairs and 5 for the training on 2 CPU cores that do other work too.
Expect: 58 % of the held-out pairs in order; no more questions right than before (docs).

The model is that of `init_from`, which is the reference too. The rates of papers are for models of
billions (5e-7 to 5e-6); at 1e-4 a model of some million parameters makes both answers less likely.
"""

from configs import base


def get_config():
  """Pairs of answers out of `data.path`."""
  config = base.get_config()
  config.objective.kind = 'dpo'
  config.objective.inherit = True
  config.objective.balance = False
  config.objective.dpo.sft_weight = 0.5  # holds the chosen answers up
  config.data.source = 'preferences'
  config.data.path = 'runs/pairs.jsonl'
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.1
  config.optim.peak_lr = 3e-5
  config.optim.schedule = 'linear'
  config.optim.warmup_steps = 10
  config.optim.weight_decay = 0.0
  config.train.num_steps = 50
  config.train.batch_size = 32
  config.train.z_loss_weight = 0.0
  config.train.sample_prompt = ''
  config.train.log_every = 2
  config.train.eval_every = 10
  config.checkpoint.save_every = 50
  return config
