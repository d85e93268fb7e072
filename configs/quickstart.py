"""Fine-grained DeepSeekMoE in minutes on a laptop's CPU: 1 shared + top-7 of 63 experts.

Run:    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
Takes:  165 s on 2 CPU cores from empty caches (15 s of it tokenising, 125 s training).
Expect: 2.08 bits per byte on held-out standard library files of Python 3.11 (one seed).
"""

from configs import base, recipes, sizes

WIDTH = sizes.LAPTOP_FFN  # of the conventional MoE that is being refined; 4 experts make one of its


def _gshard(config):
  """Conventional MoE of equal parameters and FLOPs: top-2 of 16 experts, four times as wide."""
  recipes.experts(config, shared=0, routed=16, per_tok=2, width=WIDTH)
  config.model.moe.norm_topk_prob = True


VARIANTS = {
  'gshard': _gshard,
  'dense': lambda config: recipes.make_dense(config, 2 * WIDTH),  # equal activated parameters
}


def get_config(variant=''):
  """`:gshard` and `:dense` match the page's activated parameters and FLOPs."""
  config = sizes.laptop(base.get_config())
  config.model.vocab_size = 2048
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=WIDTH / 4)
  config.train.num_steps = 500
  config.train.batch_size = 4  # small: at this budget more steps beat larger batches
  config.checkpoint.save_every = 100
  return recipes.variant(config, variant, VARIANTS)
