"""Loss-free balancing against balance losses (arXiv 2408.15664, sections 3-4) at five sizes.

Run:    python -m experiments.train --config=configs/loss_free.py:SIZE_METHOD --workdir=W
          (without a variant: tiny_loss_free)
Count:  python -m experiments.describe --config=configs/loss_free.py:1b_loss_free
Takes:  tiny minutes, mini hours of a CPU core; small one GPU; 1b and 3b 1.2e20 and 5.4e20 FLOPs;
        not measured.
Expect: a lower perplexity and a far lower MaxVio than aux, as below. tiny, 3.1M tokens: MaxVio 0.67
        against 1.84, the loss not decided (experiments/routing_ablation).

  size    experts                                      parameters   tokens
  tiny    2 shared + 6 of 64, 3 layers, D = 64         1.0M         0.3M     ours
  mini    2 shared + 6 of 64, 4 layers, D = 160        8.9M         20.5M    ours
  small   2 shared + 6 of 64, 8 layers, D = 384        149M         131M     ours
  1b      2 shared + 6 of 64, 10 layers, D = 1024      1.05B        94.4B    the paper's
  3b      2 shared + 6 of 64, 12 layers, D = 1280      2.55B        200.0B   the paper's

  method             score     balance                          perplexity, MaxVio: 1b      3b
  aux                sigmoid   expert-level loss, alpha 1e-3    9.56, 0.72          7.97, 0.52
  loss_free          sigmoid   b += u sign(e), TopK(s + b)      9.50, 0.04          7.92, 0.04
  proportional       sigmoid   b += u e / mean load             9.51, 0.036
  multiplicative     sigmoid   b += u sign(e), TopK(s * b)      9.52, 0.036
  softmax_aux        softmax   expert-level loss, alpha 3e-4    9.604, 0.937
  softmax_loss_free  softmax   b += u e / mean load             9.599, 0.027

Perplexity and MaxVio (of the whole validation set, mean over layers) are the paper's, at 1b and 3b.
u = 1e-3, tuned for 40,000 steps: shorter runs may want more. e = mean load - load, of the whole
batch; the paper leaves its scale in the proportional rule open, and dividing by the mean load is
our reading. Within one size the methods differ in score function, bias and balance loss only.

As in the paper, one dense layer comes first and gates are neither normalised nor scaled. Not stated
there: the width of a whole FFN, taken as 8/3 D, so that experts are 512 wide (1b, 3/16 of it) and
853.33, rounded (3b; config.paper keeps exact widths); 128 per head; AdamW and clipping, taken from
DeepSeekMoE. 1b and 3b need a corpus: --config.data.source=parquet
--config.data.path='corpus/*.parquet', and --config.train.micro_batch_size.
"""

import itertools

from configs import base, recipes, sizes

UPDATE_RATE = 1e-3  # u of every method that has a bias


def _experts(config: base.Page, ffn: float, width: float):
  """The paper's layers: the first is dense, with a whole FFN; 2 shared + 6 of 64 experts."""
  config.model.num_dense_layers = 1
  recipes.experts(config, shared=2, routed=64, per_tok=6, width=width)
  recipes.dense_ffn(config, ffn)


def _tiny(config: base.Page):
  sizes.tiny(config)
  _experts(config, ffn=sizes.TINY_FFN, width=sizes.TINY_FFN / 4)


def _mini(config: base.Page):
  sizes.mini(config)
  _experts(config, ffn=sizes.MINI_FFN, width=sizes.MINI_FFN / 4)


def _small(config: base.Page):
  sizes.small(config)
  _experts(config, ffn=sizes.SMALL_FFN, width=sizes.SMALL_FFN / 4)


def _paper(config: base.Page, embed_dim: int, num_moe_layers: int, granularity: float):
  """What the paper's two sizes share."""
  config.model.vocab_size = 32_064
  config.model.max_seq_len = 2048
  config.model.embed_dim = embed_dim
  config.model.num_layers = 1 + num_moe_layers
  config.model.num_heads = embed_dim // 128
  config.model.init_std = 0.006
  config.model.dtype = 'bfloat16'
  config.model.remat = 'moe_core'
  config.model.attention.num_kv_heads = embed_dim // 128
  config.model.attention.head_dim = 128
  ffn = 8 / 3 * embed_dim
  _experts(config, ffn=ffn, width=ffn / granularity)
  config.train.eval_every = 1000


def _1b(config: base.Page):
  _paper(config, embed_dim=1024, num_moe_layers=9, granularity=16 / 3)
  config.optim.peak_lr = 1e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 1000
  config.optim.final_lr_fraction = 0.1
  config.train.num_steps = 40_000
  config.train.batch_size = 1152


def _3b(config: base.Page):
  _paper(config, embed_dim=1280, num_moe_layers=11, granularity=4)
  config.optim.peak_lr = 7.8e-4
  config.optim.schedule = 'multi_step'
  config.optim.warmup_steps = 2000
  config.optim.multi_step_boundaries = (45_211 / 56_514, 50_862 / 56_514)
  config.optim.multi_step_factor = 0.1**0.5  # 2.47e-4, then 7.8e-5
  config.train.num_steps = 56_514
  config.train.batch_size = 1728


def _auxiliary(config: base.Page, score_func: str, alpha: float):
  config.model.moe.score_func = score_func
  recipes.minimise(config, expert_level=alpha)


def _bias(config: base.Page, score_func: str, update_rule: str, form: str = 'additive'):
  config.model.moe.score_func = score_func
  recipes.minimise(config)
  config.model.moe.expert_bias.update_rule = update_rule
  config.model.moe.expert_bias.form = form
  config.model.moe.expert_bias.update_rate = UPDATE_RATE


SIZES: base.Variants = {'tiny': _tiny, 'mini': _mini, 'small': _small, '1b': _1b, '3b': _3b}
METHODS: base.Variants = {
  'aux': lambda config: _auxiliary(config, 'sigmoid', 1e-3),
  'loss_free': lambda config: _bias(config, 'sigmoid', 'sign'),
  'proportional': lambda config: _bias(config, 'sigmoid', 'proportional'),
  'multiplicative': lambda config: _bias(config, 'sigmoid', 'sign', form='multiplicative'),
  'softmax_aux': lambda config: _auxiliary(config, 'softmax', 3e-4),
  'softmax_loss_free': lambda config: _bias(config, 'softmax', 'proportional'),
}


def _combined(size: str, method: str) -> base.Variant:
  return lambda config: (SIZES[size](config), METHODS[method](config))


VARIANTS = {f'{s}_{m}': _combined(s, m) for s, m in itertools.product(SIZES, METHODS)}


def get_config(variant: str = '') -> base.Page:
  """One of `VARIANTS`; without a name, tiny_loss_free."""
  return recipes.variant(base.get_config(), variant or 'tiny_loss_free', VARIANTS)
