"""The model family of the scaling-law study (DeepSeek LLM, arXiv 2401.02954, section 3), one dial.

Run:    python -m experiments.scaling_laws --scale=tiny --workdir=runs/scaling
          or one model of it: python -m experiments.train --config=configs/scaling.py:tiny_dense_4
          --workdir=W (without a variant: tiny_dense_4)
Takes:  see experiments/scaling_laws/README.md; tiny is for one CPU core, small for one GPU.
Expect: what experiments/scaling_laws/results says; a single run here has the page's own 500 steps.

The dial counts query heads: embed_dim = head_dim x dial, and the depth grows with it. All FFNs are
8/3 D wide, so that a dense model has N1 = 12 num_layers D^2. `moe` replaces each by 1 shared + 3 of
15 routed experts of a quarter of its width: the same activated quantities M, N1 and N2, four times
the FFN's parameters. Sigmoid gates, divided by their sum, since short runs do not teach raw softmax
gates to count (experiments/routing_ablation).

  scale   head dim   vocabulary   context   dial       embed_dim    layers
  tiny    8          512          64        1 ... 12   8 ... 96     2 ... 4
  small   64         8192         1024      1 ... 12   64 ... 768   2 ... 12
"""

import itertools

from configs import base, recipes

TINY_LAYERS = {1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3, 10: 3, 12: 4}  # by dial
SMALL_LAYERS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 8: 8, 10: 10, 12: 12}


def _sizes(config: base.Page, dial: int, layers: int, head_dim: int):
  config.model.embed_dim = head_dim * dial
  config.model.num_layers = layers
  config.model.num_dense_layers = 0
  config.model.num_heads = dial
  config.model.attention.num_kv_heads = dial
  config.model.attention.head_dim = head_dim


def _tiny(config: base.Page, dial: int):
  config.model.vocab_size = 512
  config.model.max_seq_len = 64
  config.model.init_std = 0.05
  config.data.heldout_fraction = 0.003
  config.optim.peak_lr = 1e-2
  config.optim.warmup_steps = 20
  config.train.num_steps = 500
  config.train.batch_size = 8
  config.train.micro_batch_size = 4  # one program per model; a batch is some of these
  config.train.loss_chunk = 1024
  _sizes(config, dial, TINY_LAYERS[dial], head_dim=8)


def _small(config: base.Page, dial: int):
  config.model.vocab_size = 8192
  config.model.max_seq_len = 1024
  config.model.init_std = 0.02
  config.model.dtype = 'bfloat16'
  config.optim.peak_lr = 2e-3
  config.optim.warmup_steps = 50
  config.train.num_steps = 500
  config.train.batch_size = 32
  config.train.micro_batch_size = 16
  config.train.loss_chunk = 16_384
  _sizes(config, dial, SMALL_LAYERS[dial], head_dim=64)


def _dense(config: base.Page):
  recipes.make_dense(config, 8 / 3 * config.model.embed_dim)


def _moe(config: base.Page):
  recipes.experts(config, shared=1, routed=15, per_tok=3, width=2 / 3 * config.model.embed_dim)
  config.model.moe.score_func = 'sigmoid'
  config.model.moe.norm_topk_prob = True
  recipes.minimise(config, expert_level=1e-3)


SCALES = {'tiny': (_tiny, TINY_LAYERS), 'small': (_small, SMALL_LAYERS)}
KINDS: base.Variants = {'dense': _dense, 'moe': _moe}


def _combined(scale: str, kind: str, dial: int) -> base.Variant:
  return lambda config: (SCALES[scale][0](config, dial), KINDS[kind](config))


VARIANTS = {
  f'{scale}_{kind}_{dial}': _combined(scale, kind, dial)
  for scale, kind in itertools.product(SCALES, KINDS)
  for dial in SCALES[scale][1]
}


def get_config(variant: str = '') -> base.Page:
  """One of `VARIANTS`, `<scale>_<kind>_<dial>`; without a name, tiny_dense_4."""
  return recipes.variant(base.get_config(), variant or 'tiny_dense_4', VARIANTS)
