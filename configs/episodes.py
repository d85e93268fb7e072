"""A tiny model that learns from context: what a label word stands for is new in every episode.

Run:    python -m experiments.train --config=configs/episodes.py --workdir=runs/episodes
        python -m experiments.anchors --workdir=runs/episodes --task=episodes
Takes:  about an hour of one CPU core for `dense` (0.12 s a step); not run to its end.
Expect: not known. After 1,059 steps it chooses at random among the label words of the episode
        (loss 0.47 over label words and end tokens, which are sure); see experiments/anchors.
"""

from configs import base, recipes, sizes

WIDTH = 48  # of the conventional MoE that is being refined


def _gshard(config):
  """Conventional MoE of equal parameters and FLOPs: top-2 of 8 experts, four times as wide."""
  recipes.experts(config, shared=0, routed=8, per_tok=2, width=WIDTH)
  config.model.moe.norm_topk_prob = True


VARIANTS = {
  'gshard': _gshard,
  'dense': lambda config: recipes.make_dense(config, 2 * WIDTH),  # equal activated parameters
}


def get_config(variant=''):
  """`:gshard` and `:dense` match the page's activated parameters and FLOPs."""
  config = sizes.laptop(base.get_config())
  config.model.vocab_size = 448  # every word is a token
  config.model.max_seq_len = 96  # 13 items and a query at most; short episodes share a row
  config.model.embed_dim = 48
  config.model.num_layers = 6
  config.model.num_heads = 3
  config.model.attention.num_kv_heads = 3
  config.model.attention.head_dim = 16
  recipes.experts(config, shared=1, routed=31, per_tok=7, width=WIDTH / 4)
  config.objective.kind = 'sft'
  config.data.source = 'episodes'
  config.data.path = '?classes=3&queries=6&words=2&mixed=1&episodes=40000'
  config.data.chat_format = 'marks'
  config.data.heldout_fraction = 0.02
  config.optim.peak_lr = 3e-3
  config.train.num_steps = 20_000
  config.train.batch_size = 16
  config.train.routing_every = 0
  config.train.sample_prompt = ''
  config.checkpoint.save_every = 1000
  return recipes.variant(config, variant, VARIANTS)
