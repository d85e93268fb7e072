"""DeepSeekMoE's ladder of baselines (arXiv 2401.06066, section 4) in hours of a CPU core.

Run:    python -m experiments.train --config=configs/deepseekmoe_mini.py[:VARIANT] --workdir=W
Count:  python -m experiments.describe --config=configs/deepseekmoe_mini.py[:VARIANT]
Takes:  2.7e14 FLOPs (20.5M tokens): some 1.7 hours of one core, as ten steps say.
Expect: one size up from deepseekmoe_tiny, where fine-grained experts lead after 3M tokens
        (experiments/routing_ablation); our losses are not yet measured.

  variant               experts                              parameters    activated
  (none)                1 shared + 7 of 63, 80 wide          10.9M         2.3M
  gshard                2 of 16, 320 wide                    10.9M         2.3M
  gshard_x1.2, _x1.5    the same, 384 and 480 wide           12.9M, 15.8M  2.6M, 2.9M
  switch, hash          1 of 16, 320 wide; hash by token id  10.9M         1.7M
  dense, _x4, _x16      FFN 320, 1280, 5120 wide             1.7M, 3.5M, 10.9M, all of them
  1_15, 1_31            1 shared + 1 of 15, 3 of 31          10.9M         2.3M
  shared_2, shared_4    2 + 6 of 62, 4 + 4 of 60, 80 wide    10.9M         2.3M
  half                  1 shared + 3 of 63, 80 wide          10.9M         1.7M

Equal sizes are exactly equal but for the routers (160 weights per routed expert and layer); 0.7M of
each are embeddings. Sizes and training settings are ours (configs/base.py); what the variants are
is the paper's, see configs/deepseekmoe_2b.py.
"""

from configs import base, recipes, sizes

VARIANTS = recipes.ladder(sizes.MINI_FFN)


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  return recipes.variant(sizes.mini(base.get_config()), variant, VARIANTS)
