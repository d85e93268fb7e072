"""ESFT (arXiv 2407.01906): of a model with small experts, only those are tuned that a task uses.

Run:    python -m experiments.esft score --workdir=runs/quickstart --config=configs/sft.py \
          --config.init_from=runs/quickstart --tokens=16384 --out=runs/scores
        python -m experiments.esft select --scores=runs/scores/summary.json --out=runs/scores
        python -m experiments.train --config=configs/esft.py --config.init_from=runs/quickstart \
          --config.trainable.expert_config=runs/scores/expert_cfg.json --workdir=runs/esft
Takes:  as long as `sft`.
Expect: a first line with the trained share. With the optimizer of `sft`, after 120 steps: no right
        answer, 0.18 bits per byte of the base's own text lost (experiments/specialisation).
        `:lines`, from configs/purify.py: 92 % of 203 held-out lines right, [87, 95], 1.4 bits per
        byte lost, in half a minute of one core (docs/topics/fine_tuning.md).

The data of `sft`. The paper tunes DeepSeek-V2-Lite at a constant rate of 1e-5, a third of that for
all weights, with this weight decay.
"""

from configs import base, recipes


def _lines(config: base.Page):
  """Code or prose, at a rate that was swept (experiments/specialisation)."""
  recipes.tune_on_lines(config)
  config.trainable.kind = 'experts'
  config.optim.peak_lr = 1e-2


VARIANTS = {'lines': _lines}


def get_config(variant: str = '') -> base.Page:
  """Sums, with the paper's optimizer, for chosen experts; or `:lines`."""
  config = base.get_config()
  if variant:
    return recipes.variant(config, variant, VARIANTS)
  recipes.tune_on_sums(config)
  config.trainable.kind = 'experts'
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 0.1
  return config
