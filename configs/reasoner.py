"""A tiny model that does sums step by step, from random weights: a base for studies of tuning.

Run:    python -m experiments.train --config=configs/reasoner.py --workdir=runs/reasoner
        python -m experiments.answers --workdir=runs/reasoner
Takes:  22 minutes on 2 CPU cores that do other work too.
Expect: 125 of 512 held-out questions right, 24 % [21, 28] (one seed).

`:small` does easier sums with 0.7 million parameters in three minutes: a start for configs/grpo.py
with room above it, 224 of 511 held-out questions right, 44 % [40, 48]; 18 to 34 % with others.
`:small_dense` is a dense model of its activated parameters.
`:small_programs` writes easy programs, which `experiments.answers` runs (docs/topics/rewards.md):
91 of 239 held-out ones pass, 38 % [32, 44] (one seed), a start for configs/grpo.py:small_programs.
`:programs` writes harder ones: 26 of 256 pass after 600 steps, 10 % [7, 15] (one seed).
Bytes are tokens, so that a digit is one. The dial is `data.path`, see docs/topics/fine_tuning.md.
"""

from configs import base, recipes, sizes

WIDTH = sizes.LAPTOP_FFN  # of the conventional MoE that is being refined


def _gshard(config):
  """Conventional MoE of equal parameters and FLOPs: top-2 of 8 experts, four times as wide."""
  recipes.experts(config, shared=0, routed=8, per_tok=2, width=WIDTH)
  config.model.moe.norm_topk_prob = True


def _programs(config):
  """Functions of up to two operations on a number or a list."""
  config.data.source = 'programs'
  config.data.path = '?operations=2&max_value=9&kinds=2&problems=40000'


def _small(config):
  """Easier sums for a smaller model: minutes on one core, a start for configs/grpo.py."""
  sizes.tiny(config)
  config.model.vocab_size, config.model.max_seq_len = 288, 96
  recipes.experts(config, shared=1, routed=15, per_tok=3, width=sizes.TINY_FFN / 2)
  recipes.small_sums(config)
  config.train.num_steps = 800
  config.train.batch_size = 24  # a conversation a row
  config.train.eval_every = 200
  config.checkpoint.save_every = 200


def _small_dense(config):
  """`:small` without experts: its activated parameters and FLOPs."""
  _small(config)
  recipes.make_dense(config, 2 * sizes.TINY_FFN)


def _small_programs(config):
  """Easier programs for a smaller model: a start for configs/grpo.py:small_programs."""
  _small(config)
  recipes.small_programs(config)
  config.model.max_seq_len = 160


VARIANTS = {
  'small': _small,
  'small_programs': _small_programs,
  'small_dense': _small_dense,
  'gshard': _gshard,
  'programs': _programs,
  'dense': lambda config: recipes.make_dense(config, 2 * WIDTH),  # equal activated parameters
}


def get_config(variant=''):
  """`:gshard` and `:dense` match the page's activated parameters and FLOPs."""
  config = sizes.laptop(base.get_config())
  config.model.vocab_size = 288  # 256 bytes and the special tokens, up to a multiple of 32
  recipes.experts(config, shared=1, routed=31, per_tok=7, width=WIDTH / 4)
  config.objective.kind = 'sft'
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=50&operations=3&problems=40000'
  config.data.tokenizer = 'bytes'
  config.data.heldout_fraction = 0.05
  config.train.num_steps = 1000
  config.train.batch_size = 8
  config.train.sample_prompt = ''
  config.train.eval_every = 250
  config.checkpoint.save_every = 250
  return recipes.variant(config, variant, VARIANTS)
