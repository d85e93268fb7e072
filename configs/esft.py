"""ESFT (arXiv 2407.01906): of a model with small experts, only those are tuned that a task uses.

Run:    python -m experiments.esft score --workdir=runs/quickstart --config=configs/sft.py \
          --config.init_from=runs/quickstart --tokens=16384 --out=runs/scores
        python -m experiments.esft select --scores=runs/scores/summary.json --out=runs/scores
        python -m experiments.train --config=configs/esft.py --config.init_from=runs/quickstart \
          --config.trainable.expert_config=runs/scores/expert_cfg.json --workdir=runs/esft
Takes:  as long as `sft`.
Expect: a first line with the trained share; its right answers are not measured yet.

The data of `sft`. The paper tunes DeepSeek-V2-Lite at a constant rate of 1e-5, a third of that for
all weights, with this weight decay.
"""

from configs import base


def get_config():
  """Sums of up to three operations on numbers to 20."""
  config = base.get_config()
  config.trainable.kind = 'experts'
  config.objective.kind = 'sft'
  config.objective.inherit = True
  config.objective.balance = False
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=20&operations=3&problems=20000'
  config.data.tokenizer = ''  # that of init_from, as the next
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.05
  config.optim.peak_lr = 2e-3
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 0.1
  config.train.num_steps = 300
  config.train.batch_size = 8
  config.train.sample_prompt = ''
  config.train.eval_every = 100
  config.checkpoint.save_every = 100
  return config
