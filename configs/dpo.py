"""Direct preference optimisation: a tuned run learns which of two answers is preferred.

Run:    python -m experiments.train --config=configs/reasoner.py:small --workdir=runs/reasoner
        python -m experiments.make_pairs --workdir=runs/reasoner --out=runs/pairs.jsonl \
          --n=4096 --max_new_tokens=48
        python -m experiments.train --config=configs/dpo.py --config.init_from=runs/reasoner \
          --config.data.path=runs/pairs.jsonl --config.model.max_seq_len=192 --workdir=runs/dpo
        python -m experiments.answers --workdir=runs/dpo --against=runs/reasoner --samples=2 --n=512
Takes:  two, one and two minutes of an idle CPU core.
Expect: 68 % of the held-out pairs in order; of 511 held-out questions right, paired, +5.4 points
        [+0.6, +10.2] over four seeds (docs/topics/fine_tuning.md).

The model is that of `init_from`, which is the reference too; a row holds both answers of a pair,
each with its prompt. The rates of papers are for models of billions (5e-7 to 5e-6). Two answers
that differ in a digit share most of their tokens: a small beta lets both sink, see the docs.
"""

from configs import base


def get_config():
  """Pairs of answers out of `data.path`."""
  config = base.get_config()
  config.objective.kind = 'dpo'
  config.objective.inherit = True
  config.objective.balance = False
  config.objective.dpo.beta = 1.0  # the loss is content with a small margin
  config.objective.dpo.sft_weight = 1.0  # holds the chosen answers up
  config.data.source = 'preferences'
  config.data.path = 'runs/pairs.jsonl'
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.1
  config.optim.peak_lr = 1e-4
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 10
  config.optim.weight_decay = 0.0
  config.train.num_steps = 150
  config.train.batch_size = 32
  config.train.z_loss_weight = 0.0
  config.train.sample_prompt = ''
  config.train.log_every = 2
  config.train.eval_every = 50
  config.checkpoint.save_every = 150
  return config
