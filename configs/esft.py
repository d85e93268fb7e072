"""ESFT (arXiv 2407.01906): of a model with small experts, only those are tuned that a task uses.

Run:    python -m experiments.esft score --workdir=runs/quickstart --config=configs/sft.py \
          --config.init_from=runs/quickstart --tokens=16384 --out=runs/scores
        python -m experiments.esft select --scores=runs/scores/summary.json --out=runs/scores
        python -m experiments.train --config=configs/esft.py --config.init_from=runs/quickstart \
          --config.trainable.expert_config=runs/scores/expert_cfg.json --workdir=runs/esft
Takes:  as long as `sft`.
Expect: a first line with the trained share. With the optimizer of `sft`, after 120 steps: no right
        answer, 0.18 bits per byte of the base's own text lost (experiments/specialisation).

The data of `sft`. The paper tunes DeepSeek-V2-Lite at a constant rate of 1e-5, a third of that for
all weights, with this weight decay.
"""

from configs import base, recipes


def get_config():
  """Sums, with the paper's optimizer, for chosen experts."""
  config = recipes.tune_on_sums(base.get_config())
  config.trainable.kind = 'experts'
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 0.1
  return config
