"""DeepSeekMoE's ladder of baselines (arXiv 2401.06066, section 4) for one GPU: 162M parameters.

Run:    python -m experiments.train --config=configs/deepseekmoe_small.py[:VARIANT] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
Count:  python -m experiments.describe --config=configs/deepseekmoe_small.py[:VARIANT]
Takes:  2.4e16 FLOPs (131M tokens); time not yet measured.
Expect: the order of the paper's Pile losses, below; our losses are not yet measured.

  variant               experts                              parameters    activated    paper, 2B
  (none)                1 shared + 7 of 63, 256 wide         162.0M        29.9M        1.808
  gshard                2 of 16, 1024 wide                   162.0M        29.9M        1.867
  gshard_x1.2, _x1.5    the same, 1229 and 1536 wide         192M, 238M    34M, 39M     1.824, 1.808
  switch, hash          1 of 16, 1024 wide                   162.0M        20.5M        1.881, 1.932
  dense                 FFN 1024 wide                        20.5M         20.5M        2.060
  dense_x4, _x16        FFN 4096, 16384 wide                 49M, 162M     all of them  1.908, 1.806
  1_15, 1_31            1 shared + 1 of 15, 3 of 31          162.0M        29.9M        not printed
  shared_2, shared_4    2 + 6 of 62, 4 + 4 of 60, 256 wide   162.0M        29.9M        1.806, 1.811
  half                  1 shared + 3 of 63, 256 wide         162.0M        20.5M        not printed

Equal sizes are exactly equal: a whole FFN is 8/3 D = 1024 wide, and its half and quarter leave no
remainder. Only the routers (384 weights per routed expert and layer) are counted apart.

The default source, the standard library's 31 MB, would be read more than ten times over: point
config.data at more text. Sizes and training settings are ours (configs/base.py): rate, batch and
length for an hour or less on one GPU, the paper's schedule and optimizer; what the variants are is
the paper's, see configs/deepseekmoe_2b.py.
"""

from configs import base, recipes, sizes

VARIANTS = recipes.ladder(sizes.SMALL_FFN)


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  return recipes.variant(sizes.small(base.get_config()), variant, VARIANTS)
