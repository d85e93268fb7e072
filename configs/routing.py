"""Every routing scheme we know on one tiny model, with the same data and the same start.

Run:    python -m experiments.train --config=configs/routing.py:<name> --workdir=W
          (without a name: deepseekmoe)
Takes:  minutes on 2 CPU cores; measured in experiments/routing_ablation/README.md.
Expect: the losses, loads and drops of experiments/routing_ablation/tiny/report.md.

What each name is, and the paper it comes from: `SUMMARY` at the end of this page.

Fine-grained: 1 shared + 7 of 63 experts, 32 wide. Coarse: 16 experts, 128 wide, two per token
(gshard*, capacity_*, expert_choice*, skywork) or one (switch, hash*). ds_moe: 64 experts, 32 wide.
All but dense have the same parameters, routers apart, and all but three activate the same: switch
and hash* half of the experts' weights, ds_moe all in training and a varying number outside of it.
num_virtual_devices = 8 everywhere: 63 experts are 7 blocks of 8 and one of 7.

Where the papers are silent, or their setting does not fit this size:
* gshard: our capacity is factor * K * tokens / E, so with K = 2 a factor of 1.0 is 2 N / E. A group
  of tokens is one row. Its loss weighs 0.01 * E^2, which has the gradient of Switch's 0.01.
* switch, skywork, capacity_*: groups of one row. Skywork's report has no capacity factor: 1.25.
* device_limited_v2: 7 of 63 experts for V2's 6 of 160; factors 0.003, 0.05 and 0.02 as there.
* group_limited_v3 balances with V3's normalised sequence loss at DeepSeekMoE's weight for this size
  (0.01), so that it and v3 differ in how they balance and in nothing else.
* loss_free*: u = 1e-3 as in the paper, tuned for 40,000 steps. e / mean load is our reading of its
  proportional rule. sigmoid is its baseline.
* ds_moe: the loss weights of the 1B model. Outside of training it uses the paper's best trade-off,
  the threshold: an expert is active if E * score > 0.48, its value for the 3B model. The topk rule
  with K = 8 is --config.model.moe.options.inference=topk. The 4 attention heads are 2 experts of 2.
* expert_choice* cannot be sampled from: whether a token is taken depends on later ones.
"""

from configs import base, recipes, sizes

UPDATE_RATE = 1e-3  # u of every scheme that has an expert bias
EXPERTS = 16  # of the coarse schemes


def get_config(variant: str = '') -> base.Page:
  """One of `VARIANTS`; without a name, deepseekmoe."""
  return recipes.variant(sizes.tiny(base.get_config()), variant or 'deepseekmoe', VARIANTS)


def _deepseekmoe(config: base.Page):
  recipes.minimise(config, expert_level=0.01)


def _deepseekmoe_norm(config: base.Page):
  _deepseekmoe(config)
  config.model.moe.norm_topk_prob = True


def _sigmoid(config: base.Page):
  config.model.moe.score_func = 'sigmoid'
  recipes.minimise(config, expert_level=0.001)


def _coarse(config: base.Page, per_tok: int):
  """16 experts, four times as wide as the fine-grained ones; nothing balances them yet."""
  recipes.experts(config, shared=0, routed=EXPERTS, per_tok=per_tok, width=sizes.TINY_FFN)
  recipes.minimise(config)


def _capacity(config: base.Page, policy: str, factor: float):
  config.model.moe.capacity.policy = policy
  config.model.moe.capacity.factor = factor
  config.model.moe.capacity.group_rows = 1
  config.model.moe.dispatch = 'capacity'


def _gshard(config: base.Page, policy: str = 'position'):
  _coarse(config, per_tok=2)
  config.model.moe.norm_topk_prob = True
  config.model.moe.options.random_second_expert = True
  _capacity(config, policy, factor=1.0)  # 2 N / E
  recipes.minimise(config, gshard=0.01 * EXPERTS**2)


def _gshard_dropless(config: base.Page):
  _coarse(config, per_tok=2)
  config.model.moe.norm_topk_prob = True
  recipes.minimise(config, expert_level=0.01)


def _switch(config: base.Page):
  _coarse(config, per_tok=1)
  config.model.moe.options.input_jitter = 1e-2
  _capacity(config, 'position', factor=1.25)
  recipes.minimise(config, switch=0.01)


def _hash(config: base.Page, table: str):
  _coarse(config, per_tok=1)
  config.model.moe.router = 'hash'
  config.model.moe.options.hash_table = table


def _expert_choice(config: base.Page, shuffle: bool):
  _coarse(config, per_tok=2)
  config.model.moe.router = 'expert_choice'
  config.model.moe.options.shuffle_chunks = shuffle
  config.model.moe.dispatch = 'capacity'
  config.train.sample_prompt = ''


def _sinkhorn(config: base.Page):
  config.model.moe.router = 'sinkhorn'
  recipes.minimise(config)


def _device_limited_v2(config: base.Page):
  _groups(config, num_limited=3, score='max')
  recipes.minimise(config, expert_level=0.003, device_level=0.05, communication=0.02)


def _groups(config: base.Page, num_limited: int, score: str):
  config.model.moe.num_expert_groups = 8
  config.model.moe.num_limited_groups = num_limited
  config.model.moe.group_score = score


def _v2_dropping(config: base.Page):
  _device_limited_v2(config)
  config.model.moe.capacity.policy = 'device'
  config.model.moe.capacity.factor = 1.0
  config.model.moe.capacity.group_rows = 0
  config.model.moe.capacity.exempt_fraction = 0.1


def _group_limited_v3(config: base.Page):
  _groups(config, num_limited=4, score='top2_sum')
  config.model.moe.score_func = 'sigmoid'
  config.model.moe.norm_topk_prob = True
  config.model.moe.routed_scaling_factor = 2.5
  recipes.minimise(config, normalized_expert_level=0.01)


def _bias(config: base.Page, update_rule: str, form: str = 'additive'):
  config.model.moe.expert_bias.update_rule = update_rule
  config.model.moe.expert_bias.form = form
  config.model.moe.expert_bias.update_rate = UPDATE_RATE


def _v3(config: base.Page):
  _group_limited_v3(config)
  _bias(config, 'sign')
  config.model.moe.expert_bias.update_until = 14.3 / 14.8  # trillions of tokens
  recipes.minimise(config, normalized_expert_level=1e-4)


def _loss_free(config: base.Page, score_func: str, update_rule: str, form: str = 'additive'):
  config.model.moe.score_func = score_func
  recipes.minimise(config)
  _bias(config, update_rule, form)


def _skywork(config: base.Page):
  _coarse(config, per_tok=2)
  config.model.moe.norm_topk_prob = True
  config.model.moe.options.logit_norm_scale = 1.0
  _capacity(config, 'position', factor=1.25)
  adaptive = config.model.moe.balance.adaptive
  adaptive.loss = 'squared_deviation'
  recipes.minimise(
    config, squared_deviation=adaptive.max_coefficient
  )  # where the coefficient starts


def _ds_moe(config: base.Page):
  recipes.experts(config, shared=0, routed=64, per_tok=8, width=sizes.TINY_FFN / 4)
  config.model.attention.num_experts = 2
  config.model.moe.router = 'ds_moe'
  config.model.moe.dispatch = 'dense'
  config.model.moe.options.inference = 'threshold'
  config.model.moe.options.inference_threshold = 0.48
  recipes.minimise(config, mutual_information=6.3e-4, attention_mutual_information=3.5e-4)


def _balanced(config: base.Page):
  config.model.moe.router = 'balanced'
  recipes.minimise(config)


def _skewed(config: base.Page):
  config.model.moe.router = 'skewed'
  config.model.moe.options.skew = 0.5
  recipes.minimise(config)


VARIANTS: base.Variants = {
  'deepseekmoe': _deepseekmoe,
  'deepseekmoe_norm': _deepseekmoe_norm,
  'sigmoid': _sigmoid,
  'gshard': _gshard,
  'gshard_dropless': _gshard_dropless,
  'capacity_score': lambda config: _gshard(config, 'score'),
  'capacity_batch_priority': lambda config: _gshard(config, 'batch_priority'),
  'switch': _switch,
  'hash': lambda config: _hash(config, 'random'),
  'hash_balanced': lambda config: _hash(config, 'balanced'),
  'expert_choice': lambda config: _expert_choice(config, shuffle=False),
  'expert_choice_shuffled': lambda config: _expert_choice(config, shuffle=True),
  'sinkhorn': _sinkhorn,
  'device_limited_v2': _device_limited_v2,
  'v2_dropping': _v2_dropping,
  'group_limited_v3': _group_limited_v3,
  'v3': _v3,
  'loss_free': lambda config: _loss_free(config, 'sigmoid', 'sign'),
  'loss_free_softmax': lambda config: _loss_free(config, 'softmax', 'proportional'),
  'loss_free_proportional': lambda config: _loss_free(config, 'sigmoid', 'proportional'),
  'loss_free_multiplicative': lambda config: _loss_free(
    config, 'sigmoid', 'sign', 'multiplicative'
  ),
  'skywork': _skywork,
  'ds_moe': _ds_moe,
  'dense': lambda config: recipes.make_dense(config, 2 * sizes.TINY_FFN),
  'balanced': _balanced,
  'skewed': _skewed,
}

# Name -> (what it is, arXiv id of where it comes from): the one table that all others are made of.
SUMMARY = {
  'deepseekmoe': ('raw softmax gates, expert-level loss 0.01', '2401.06066'),
  'deepseekmoe_norm': ('deepseekmoe, gates divided by their sum', '2401.06066'),
  'sigmoid': ('sigmoid gates, expert-level loss 0.001', '2408.15664'),
  'gshard': ('GShard whole: random second expert, capacity 2 N / E', '2006.16668'),
  'gshard_dropless': ("GShard's gates only: no drops, expert-level loss 0.01", '2401.06066'),
  'capacity_score': ('gshard, but the lowest scores are dropped', '2006.16668'),
  'capacity_batch_priority': ('gshard, but tokens queue by their best score', '2106.05974'),
  'switch': ('Switch whole: top-1, jitter 0.01, capacity 1.25', '2101.03961'),
  'hash': ('a random expert per token id, no router', '2106.04426'),
  'hash_balanced': ('hash, ids dealt so that experts see equally many', '2106.04426'),
  'expert_choice': ('every expert takes its best tokens of a row; not causal', '2202.09368'),
  'expert_choice_shuffled': (
    'expert_choice, rows replaced by random tokens of the batch',
    '2408.15664',
  ),
  'sinkhorn': ('S-BASE: balanced choices in training, plain top-K outside', '2202.01169'),
  'device_limited_v2': ('V2: 3 of 8 devices; expert, device, communication losses', '2405.04434'),
  'v2_dropping': ("device_limited_v2, drops above a device's mean in training", '2405.04434'),
  'group_limited_v3': ("V3's gates and 4 of 8 groups, balanced by a loss of 0.01", '2412.19437'),
  'v3': ('group_limited_v3, balanced by a bias and a loss of 1e-4', '2412.19437'),
  'loss_free': ('sigmoid, b += u sign(e), TopK(s + b)', '2408.15664'),
  'loss_free_softmax': ('softmax, b += u e / mean load', '2408.15664'),
  'loss_free_proportional': ('sigmoid, b += u e / mean load', '2408.15664'),
  'loss_free_multiplicative': ('sigmoid, b += u sign(e), TopK(s * b)', '2408.15664'),
  'skywork': ('normalised logits, loss weight driven by the drop rate', '2406.06563'),
  'ds_moe': ('all experts and heads train; sparse only outside of it', '2404.05567'),
  'dense': ('one FFN of the activated width', '2401.06066'),
  'balanced': ('forced: tokens are dealt to experts in turn', '-'),
  'skewed': ('forced: half of all first choices are expert 0', '-'),
}
