"""Supervised fine-tuning: any run learns the answers of conversations, here of sums step by step.

Run:    python -m experiments.train --config=configs/sft.py --config.init_from=runs/quickstart \
          --workdir=runs/sft
        python -m experiments.answers --workdir=runs/sft
Takes:  4 minutes of CPU time on 2 cores.
Expect: 15 % of 256 held-out questions right, [11, 20]; 0 % before.
Own data: --config.data.source=conversations --config.data.path=chats.jsonl

The model is that of `init_from`, without balance losses and with its expert bias at rest
(`objective.balance`). The papers' rates are for models of billions (DeepSeek LLM: 1e-5 for 7B, 5e-6
for 67B); a model of some million parameters takes 1e-3 and more.
"""

from configs import base


def get_config():
  """Sums of up to three operations on numbers to 20."""
  config = base.get_config()
  config.objective.kind = 'sft'
  config.objective.inherit = True
  config.objective.balance = False
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=20&operations=3&problems=20000'
  config.data.tokenizer = ''  # that of init_from, as the next
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.05
  config.optim.peak_lr = 2e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.optim.weight_decay = 0.0
  config.train.num_steps = 300
  config.train.batch_size = 8
  config.train.sample_prompt = ''
  config.train.eval_every = 100
  config.checkpoint.save_every = 100
  return config
