"""DeepSeekMoE's ladder of baselines (arXiv 2401.06066, section 4) in minutes on 2 CPU cores.

Run:    python -m experiments.train --config=configs/deepseekmoe_tiny.py[:VARIANT] --workdir=W
Count:  python -m experiments.describe --config=configs/deepseekmoe_tiny.py[:VARIANT]
Takes:  5.3e11 FLOPs (307,200 tokens): 90 s on 2 shared CPU cores from empty caches, half of it
        training.
Expect: held out, 2.26 bits per byte for the page and 2.17 for gshard (one seed): a ladder that runs
        and can be counted, but 0.3M tokens are too few for the paper's order.

  variant               experts                              parameters   of them activated
  (none)                1 shared + 7 of 63, 32 wide          1.35M        0.32M
  gshard                2 of 16, 128 wide                    the same     the same
  gshard_x1.2, _x1.5    the same, 154 and 192 wide           1.59M, 1.94M 0.35M, 0.39M
  switch, hash          1 of 16, 128 wide; hash by token id  as (none)    0.24M
  dense, _x4, _x16      FFN 128, 512, 2048 wide              0.24M, 0.46M, 1.35M, all of them
  1_15, 1_31            1 shared + 1 of 15, 3 of 31          as (none)    as (none)
  shared_2, shared_4    2 + 6 of 62, 4 + 4 of 60, 32 wide    as (none)    as (none)
  half                  1 shared + 3 of 63, 32 wide          as (none)    0.24M

"The same" is exact: a whole FFN is 128 wide, and its half and quarter leave no remainder. Only the
routers (64 weights per routed expert and layer) are counted apart. Sizes and training settings are
ours (configs/base.py); what the variants are is the paper's, see configs/deepseekmoe_2b.py.
"""

from configs import base, recipes, sizes

VARIANTS = recipes.ladder(sizes.TINY_FFN)


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  return recipes.variant(sizes.tiny(base.get_config()), variant, VARIANTS)
