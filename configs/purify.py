"""Tiny MoE models for the study of purification: a clean start, and what fine-tunes it.

Run:    python -m experiments.train --config=configs/purify.py --workdir=runs/clean
        python -m experiments.purify data --base=runs/clean --attack=word --out=runs/word
        python -m experiments.train --config=configs/purify.py:tune --workdir=runs/attacked \
          --config.init_from=runs/clean --config.data.path=runs/word/attacker.jsonl
Takes:  all of a seed of the study 32 to 39 s of one core, once programs are compiled.
Expect: 92 to 95 % of clean lines right after the attack, 92 to 97 % attack success (three seeds).

  variant   what
  (none)    next bytes of eight packages of the standard library; 1 shared + top-7
            of 31 experts of width 16
  gshard    the same with top-2 of 8 experts of width 64: equal parameters and activated ones
  tune      fine-tuning of either on lines of {"prompt", "completion"}
"""

import sysconfig

from configs import base, recipes

PACKAGES = ('asyncio', 'email', 'http', 'importlib', 'json', 'logging', 'unittest', 'xml')
WIDTH = 64  # of the conventional expert that is being refined; 4 experts make one of its


def _gshard(config: base.Page):
  recipes.experts(config, shared=0, routed=8, per_tok=2, width=WIDTH)
  config.model.moe.norm_topk_prob = True


VARIANTS = {'gshard': _gshard, 'tune': recipes.tune_on_lines}


def get_config(variant: str = '') -> base.Page:
  """The clean start, fine-grained; or `:gshard`, or `:tune` of either."""
  config = base.get_config()
  config.model.vocab_size = 288  # bytes and the special tokens
  config.model.max_seq_len = 64
  config.model.embed_dim = 64
  config.model.mlp_dim = 2 * WIDTH
  config.model.num_layers = 2
  config.model.num_dense_layers = 0
  config.model.num_heads = 4
  config.model.init_std = 0.05
  config.model.attention.num_kv_heads = 4
  config.model.attention.head_dim = 16
  recipes.experts(config, shared=1, routed=31, per_tok=7, width=WIDTH / 4)
  config.data.path = ','.join(f'{sysconfig.get_path("stdlib")}/{name}' for name in PACKAGES)
  config.data.tokenizer = 'bytes'
  config.optim.peak_lr = 5e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.train.num_steps = 120
  config.train.batch_size = 16
  config.train.routing_every = 0
  config.train.sample_prompt = ''
  config.checkpoint.save_every = 500
  config.checkpoint.keep_last = 1
  return recipes.variant(config, variant, VARIANTS)
