"""Multi-head, grouped-query, multi-query and latent attention on one tiny model, all else equal.

Run:    python -m experiments.train --config=configs/attention.py:<name> --workdir=W
          (without a name: mla)
Count:  python -m experiments.describe --config=configs/attention.py:mha
          --config=configs/attention.py:mla
Takes:  5.5e11 to 5.9e11 FLOPs (307,200 tokens): minutes on 2 shared CPU cores.
Expect: held out, 2.30 (mha), 2.34 (gqa), 2.41 (mqa) and 2.19 (mla) bits per byte (one seed on
        Python 3.11): four that run and can be counted; 0.3M tokens rank nothing.

  name   query heads   cached per layer             numbers per token   attention weights
  mha    4 of 16       4 keys, 4 values of 16       384                 49,152
  gqa    6 of 16       2 keys, 2 values of 16       192                 49,152
  mqa    7 of 16       1 key, 1 value of 16          96                 49,152
  mla    4 of 16 + 8   a latent of 32, a key of 8   120                 50,688

The cache is over all 3 layers; divided by MHA's it is 1/2, 1/4 and 0.31. What fewer key-value heads
save in weights goes into more query heads, so that all four have the same attention weights (mla:
3 % more); DeepSeek-V2 (arXiv 2405.04434, Appendix D.1) matches by depth instead, which at 3 layers
is too coarse. MLA's own sizes are V2's in proportion, without query compression (a rotated part of
half a head), but for the latent: 2 heads wide where V2's is 4, which would be a third of the model
here. Rotation is in pairs (i, i + H/2) in all four.
"""

from configs import base, recipes, sizes


def get_config(variant: str = '') -> base.Page:
  """One of `VARIANTS`; without a name, mla."""
  return recipes.variant(sizes.tiny(base.get_config()), variant or 'mla', VARIANTS)


def _heads(config: base.Page, queries: int, keys: int):
  config.model.num_heads = queries
  config.model.attention.num_kv_heads = keys


VARIANTS: base.Variants = {
  'mha': lambda config: _heads(config, queries=4, keys=4),
  'gqa': lambda config: _heads(config, queries=6, keys=2),
  'mqa': lambda config: _heads(config, queries=7, keys=1),
  'mla': lambda config: recipes.multi_latent(config, kv_lora_rank=32),
}
