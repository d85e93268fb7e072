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

from configs import base, recipes


def get_config():
  """Sums, at a rate that falls."""
  config = recipes.tune_on_sums(base.get_config())
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  return config
