"""Models for the study of watermarks: one that writes, a small one beside it, one that judges.

Run:    python -m experiments.train --config=configs/watermark.py --workdir=runs/writer
        python -m experiments.train --config=configs/watermark.py:proxy --workdir=runs/proxy
        python -m experiments.train --config=configs/watermark.py:judge --workdir=runs/judge
        python -m experiments.watermark study --writer=runs/writer --proxy=runs/proxy \
          --judge=runs/judge --workdir=runs/watermark
Takes:  10, 3 and 22 minutes for the three models on 2 cores that a dozen other programs shared.
Expect: 2.28 (writer), 2.20 (proxy) and 2.21 (judge) bits per byte on held-out text (one seed).

  variant   model                                                parameters, activated
  (none)    1 shared + top-7 of 63 experts, the quickstart's     5.5 M, 1.3 M
  proxy     dense, half as wide, 2 layers                        0.4 M
  judge     dense, 1.5 times as wide, 4 layers                   3.1 M

All three read the same text, half code (the standard library) and half prose (the descriptions of
the installed packages), with the same tokenizer.
"""

import sysconfig

import ml_collections

from configs import base, recipes, sizes

DESCRIPTIONS = f'{sysconfig.get_path("purelib")}/*.dist-info/METADATA'
SOURCES = {'code': ('python_source', ''), 'prose': ('text', DESCRIPTIONS)}


def get_config(variant: str = '') -> base.Page:
  """The writer; or `:proxy`, `:judge`."""
  config = sizes.laptop(base.get_config())
  config.model.vocab_size = 2048
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=sizes.LAPTOP_FFN / 4)
  config.data.source = 'mixture'
  for name, (source, path) in SOURCES.items():
    member = {'source': source, 'path': path, 'weight': 0.5}
    config.data.mixture[name] = ml_collections.ConfigDict(member)
  config.train.num_steps = 400
  config.train.batch_size = 4
  config.train.sample_prompt = ''
  config.checkpoint.save_every = 100
  return recipes.variant(config, variant, VARIANTS)


def _proxy(config: base.Page):
  config.model.embed_dim = 64
  config.model.num_layers = 2
  config.model.attention.head_dim = 16
  recipes.make_dense(config, 192)


def _judge(config: base.Page):
  config.model.embed_dim = 192
  config.model.num_layers = 4
  config.model.attention.head_dim = 48
  recipes.make_dense(config, 768)
  config.train.num_steps = 500


VARIANTS = {'proxy': _proxy, 'judge': _judge}
