"""A tiny model that learns from context: what a label word stands for is new in every episode.

Run:    python -m experiments.train --config=configs/episodes.py --workdir=runs/pairs
        python -m experiments.train --config=configs/episodes.py:repeated \
          --config.init_from=runs/pairs --workdir=runs/repeated
        python -m experiments.train --config=configs/episodes.py:marked \
          --config.init_from=runs/repeated --workdir=runs/episodes
        python -m experiments.anchors --workdir=runs/episodes --task=episodes
Takes:  25 and 70 seconds for two stages of `dense` on one shared CPU core, start included; about a
        minute and five for fine-grained experts on a busier one.
Expect: 0.95 to 1 of 384 queries right with one demonstration per class (chance 0.25), with four of
        five seeds (`gshard` too; `dense` with three); the loss leaves ln 4 within some 300 steps of
        each of the first two stages. Seed 4 stays at chance with all of them; a
        second stage of 1200 steps is enough for it on this page.

The first stage is pairs of a word and its label word with nothing between them, each class always
the same word (`cat gate rice lamp rice lamp`). The second puts marks around items of two words
(`> cat wolf= gate`), which are again the same for a class; in the third they are drawn anew. A
model that begins with the third chooses at random among the label words of the episode for as long
as we have looked; one that leaves out the second does so with about as many seeds.
"""

from configs import base, recipes, sizes

WIDTH = 16  # of the conventional MoE that is being refined


def _gshard(config):
  """Conventional MoE of equal parameters and FLOPs: top-2 of 8 experts, four times as wide."""
  recipes.experts(config, shared=0, routed=8, per_tok=2, width=WIDTH)
  config.model.moe.norm_topk_prob = True


def _marked(config):
  """The third stage, of whichever model `init_from` is: items drawn anew."""
  config.objective.inherit = True
  config.data.path = '?classes=4&queries=8&words=2&episodes=40000'
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = 'marks'
  config.optim.schedule = 'cosine'
  config.train.num_steps = 400
  config.train.batch_size = 32


def _repeated(config):
  """The second stage: marks around items that repeat."""
  _marked(config)
  config.data.path = '?classes=4&queries=8&words=2&repeat=1&episodes=40000'
  config.optim.schedule = 'constant'


VARIANTS = {
  'gshard': _gshard,
  'dense': lambda config: recipes.make_dense(config, 2 * WIDTH),  # equal activated parameters
  'repeated': _repeated,
  'marked': _marked,
}


def get_config(variant=''):
  """The first stage; `:gshard` and `:dense` have its activated parameters and FLOPs."""
  config = sizes.laptop(base.get_config())
  config.model.vocab_size = 448  # every word is a token
  config.model.max_seq_len = 80  # three episodes of pairs, or one of twelve items of two words
  config.model.embed_dim = 48
  config.model.num_layers = 2
  config.model.num_heads = 3
  config.model.init_std = 0.1
  config.model.attention.num_kv_heads = 3
  config.model.attention.head_dim = 16
  config.model.attention.rope.theta = 100.0
  recipes.experts(config, shared=1, routed=31, per_tok=7, width=WIDTH / 4)
  config.objective.kind = 'sft'
  config.data.source = 'episodes'
  config.data.path = '?classes=4&queries=8&words=1&repeat=1&episodes=40000'
  config.data.chat_format = 'bare'
  config.data.heldout_fraction = 0.02
  config.optim.schedule = 'constant'
  config.optim.weight_decay = 0.0
  config.train.num_steps = 800
  config.train.batch_size = 12
  config.train.routing_every = 0
  config.train.sample_prompt = ''
  config.checkpoint.save_every = 800
  return recipes.variant(config, variant, VARIANTS)
