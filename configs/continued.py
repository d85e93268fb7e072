"""Continued pre-training: a model of language goes on with code, as DeepSeek-Coder-V2 did from V2.

Run:    python -m experiments.train --config=configs/continued.py:base --workdir=runs/language
        python -m experiments.train --config=configs/continued.py --config.init_from=runs/language \
          --workdir=runs/code
        python -m experiments.evaluate --workdir=runs/code --by_domain --infill=64
Takes:  3 minutes of CPU time for each of the two runs.
Expect: held-out bits per byte, before and after: code 2.56 and 2.18, functions 1.39 and 0.34, sums
        2.62 and 1.53, language 2.01 and 2.02; no gap filled (docs/topics/continued_pretraining.md).

  variant   text                                                 fill-in-the-middle
  base      90 % language, 10 % of the others                    0
  (none)    60 % code (50 files, 10 short functions), 10 % sums,  0.5
            30 % language: the shares of Coder-V2

The text is what a machine without a network has: the standard library, made-up functions and sums,
and the descriptions of the installed packages. The model is that of `init_from`, balance losses
included. Rows of the stage may be longer than those before, under YaRN.
"""

import sysconfig

import ml_collections

from configs import base, recipes

DESCRIPTIONS = f'{sysconfig.get_path("purelib")}/*.dist-info/METADATA'
SOURCES = {
  'code': ('python_source', ''),
  'functions': ('synthetic', 'code'),
  'sums': ('synthetic', 'arithmetic'),
  'language': ('text', DESCRIPTIONS),
}
LANGUAGE = {'code': 0.08, 'functions': 0.01, 'sums': 0.01, 'language': 0.9}
CODE = {'code': 0.5, 'functions': 0.1, 'sums': 0.1, 'language': 0.3}


def get_config(variant: str = '') -> base.Page:
  """The stage that goes on, or `:base`, what it goes on from."""
  config = base.get_config()
  _mix(config, CODE)
  config.objective.inherit = True
  config.data.tokenizer = ''  # that of init_from
  config.data.fim_rate = 0.5
  config.data.synthetic_documents = 4000
  config.optim.peak_lr = 2e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.train.num_steps = 300
  config.train.batch_size = 4
  config.train.sample_prompt = ''
  config.checkpoint.save_every = 100
  return recipes.variant(config, variant, VARIANTS)


def _mix(config: base.Page, shares: dict[str, float]):
  config.data.source = 'mixture'
  for name, (source, path) in SOURCES.items():
    member = {'source': source, 'path': path, 'weight': shares[name]}
    config.data.mixture[name] = ml_collections.ConfigDict(member)


def _base(config: base.Page):
  """A model of the quickstart's size from random weights, on rows of 256 tokens."""
  _mix(config, LANGUAGE)
  config.objective.inherit = False
  config.data.tokenizer = 'bpe'
  config.data.fim_rate = 0.0
  config.model.vocab_size = 2048
  config.model.max_seq_len = 256
  config.model.embed_dim = 128
  config.model.num_layers = 3
  config.model.num_dense_layers = 0
  config.model.init_std = 0.03
  config.model.attention.head_dim = 32
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=64)
  config.optim.peak_lr = 3e-3
  config.train.num_steps = 400


VARIANTS = {'base': _base}
