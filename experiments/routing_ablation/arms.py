"""What the study trains and what it asks: arms, claims of the papers, sweeps beyond them.

Arms are the variants of the config pages at one scale. A claim compares two arms in one figure and
says what must match for the comparison to mean anything; `matching` holds it to that.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from configs import base, recipes, routing
from experiments.common import cli
from moe_jax import errors
from moe_jax.config import pages, schema


class Scale(NamedTuple):
  """Where the arms of a scale come from."""

  ladder: str  # page of `configs`
  loss_free: str  # size on the page of loss-free balancing
  kv_lora_rank: int  # of MLA, for attention weights like those of MHA, up to 3 %
  together: int  # seeds that train as an axis of one step; 1 = one run after the other
  steps: int = 0  # of every arm; 0 = as its page says


SCALES = {
  # The pages' own 300 steps decide little.
  'tiny': Scale('deepseekmoe_tiny.py', 'tiny', 32, together=8, steps=3000),
  'mini': Scale('deepseekmoe_mini.py', 'mini', 80, together=1),
  'small': Scale('deepseekmoe_small.py', 'small', 192, together=1),
  # Loss-free balancing as its paper trained it.
  '2b': Scale('deepseekmoe_2b.py', '1b', 640, together=1),
}
# Arms whose experts are as wide as a whole FFN; their rate is GShard's.
COARSE = ('gshard', 'switch', 'hash', 'gshard_x1.5', 'dense', 'dense_x16')
_DIVIDED = 'gates divided by their sum'
SEGMENTS = (1, 2, 4, 8, 16)  # m: parts that a conventional expert is cut into
# Variants of `configs/routing.py` are arms under their own names, but for these: what is an arm of
# the ladder or of a sweep already, and what has a name that means another arm here.
SAME = {'deepseekmoe': 'deepseekmoe', 'deepseekmoe_norm': 'm4', 'gshard_dropless': 'gshard'}
SAME |= {'hash': 'hash'}
RENAMED = {'gshard': 'gshard_whole', 'switch': 'switch_whole', 'dense': 'dense_x2'}
RENAMED |= {'loss_free': 'loss_free_63'}
FAMILIES = {  # of those whose rate is not that of raw softmax gates
  **dict.fromkeys(('sigmoid', 'loss_free', 'loss_free_multiplicative'), 'loss_free'),
  'loss_free_proportional': 'loss_free',
  **dict.fromkeys(('group_limited_v3', 'v3', 'ds_moe'), 'm4'),
  **dict.fromkeys(('gshard', 'switch', 'skywork', 'hash_balanced', 'dense'), 'gshard'),
  **dict.fromkeys(('expert_choice', 'expert_choice_shuffled'), 'gshard'),
  **dict.fromkeys(('capacity_score', 'capacity_batch_priority'), 'gshard'),
}
# Trained only if they are named: ablations of a variant, loads that are forced, and a router that
# learns nothing.
ASIDE = ('capacity_score', 'capacity_batch_priority', 'v2_dropping', 'loss_free_proportional')
ASIDE += ('balanced', 'skewed', 'm1')
EXPERTS = (15, 31, 63, 127)  # routed, 7 of them active
NORMALISED_WEIGHT = 1e-2  # of the balance loss of `aux_normalised`


@dataclasses.dataclass(frozen=True)
class Arm:
  """One thing that is trained, with every seed."""

  name: str
  label: str  # what it is, for people
  values: Callable[[str], ml_collections.ConfigDict]  # of a scale
  family: str  # arm whose best learning rate is this one's too, see `learning_rates`
  scales: tuple[str, ...] = tuple(SCALES)  # at which there is such a page
  aside: bool = False  # trained only if it is named
  start: str = ''  # dense arm out of whose run, of the same seed and rate, it is made; '' = none


@dataclasses.dataclass(frozen=True)
class Claim:
  """`figure` of `arm` against that of `baseline`, as a paper has it."""

  arm: str
  baseline: str  # '' = zero
  figure: str  # key of `FIGURES`
  direction: str  # see `paired.verdict`
  paper: str  # what it says, with its numbers
  matched: tuple[str, ...] = ()  # keys of `matching.quantities`
  tolerance: float = 0.005  # relative, of what must match

  @property
  def name(self) -> str:
    return f'{self.arm} against {self.baseline or "zero"}: {self.figure}'


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Arms along one quantity, with a fitted curve."""

  name: str
  title: str
  axis: str
  points: Mapping[str, float]  # arm -> value of the axis
  matched: tuple[str, ...]


def _variant(name: str) -> Callable[[str], ml_collections.ConfigDict]:
  return lambda scale: _page(SCALES[scale].ladder, name)


def _page(name: str, variant: str) -> ml_collections.ConfigDict:
  """Of the installed package `configs`, wherever the command is run."""
  path = pathlib.Path(base.__file__).parent / name
  return pages.values(f'{path}{":" if variant else ""}{variant}')


def _loss_free(method: str) -> Callable[[str], ml_collections.ConfigDict]:
  return lambda scale: _page('loss_free.py', f'{SCALES[scale].loss_free}_{method}')


def _strong_loss(scale: str) -> ml_collections.ConfigDict:
  page = _loss_free('aux')(scale)
  page.model.moe.balance['expert_level'].weight *= 10
  return page


def _normalised_loss(scale: str) -> ml_collections.ConfigDict:
  """The loss of `aux` in DeepSeek-V3's form: that each token's scores are divided by their sum.

  So it has nothing to gain from smaller gates. Its weight is the one whose MaxVio is near that of
  `loss_free` at the scale tiny; V3's own, 1e-4, is beside a bias that does the work.
  """
  page = _loss_free('aux')(scale)
  return recipes.minimise(page, normalized_expert_level=NORMALISED_WEIGHT)


def _mha(scale: str) -> ml_collections.ConfigDict:
  return recipes.multi_head(_variant('')(scale))


def _mla(scale: str) -> ml_collections.ConfigDict:
  return recipes.multi_latent(_variant('')(scale), SCALES[scale].kv_lora_rank)


def _mqa(scale: str) -> ml_collections.ConfigDict:
  page = _variant('')(scale)
  page.model.attention.num_kv_heads = 1
  return page


def _mla_cache(scale: str) -> ml_collections.ConfigDict:
  """What one head's keys and values take, the rotated half of a head's width included."""
  page = _variant('')(scale)
  width = page.model.attention.head_dim
  return recipes.multi_latent(page, 2 * width - width // 2)


def _normalised(routed: int, per_tok: int, segments: int) -> Callable[[str], Any]:
  """1 + per_tok of `routed` experts, 1 / segments wide, gates divided by their sum.

  Raw softmax gates get smaller the more experts there are, and a short run does not make up for it:
  sweeps normalise them, so that they vary what they say and nothing else.
  """

  def values(scale: str) -> ml_collections.ConfigDict:
    page = _variant('')(scale)
    whole = 4 * (page.paper.moe_mlp_dim or page.model.moe.moe_mlp_dim)
    recipes.experts(page, shared=1, routed=routed, per_tok=per_tok, width=whole / segments)
    page.model.moe.norm_topk_prob = True
    return page

  return values


def _arms() -> dict[str, Arm]:
  ladder = {
    'gshard': ('gshard', '0 shared + 2 of 16: GShard, gates divided by their sum'),
    '1_15': ('1_15', '1 shared + 1 of 15'),
    '1_31': ('1_31', '1 shared + 3 of 31, half as wide'),
    'deepseekmoe': ('', '1 shared + 7 of 63, a quarter as wide: DeepSeekMoE'),
    'switch': ('switch', '0 shared + 1 of 16: Switch'),
    'hash': ('hash', '0 shared + 1 of 16 by token id: Hash Layer'),
    'gshard_x1.5': ('gshard_x1.5', 'GShard, experts 1.5 times as wide'),
    'dense': ('dense', 'one whole FFN'),
    'dense_x16': ('dense_x16', 'an FFN 16 times as wide'),
    'shared_2': ('shared_2', '2 shared + 6 of 62'),
    'shared_4': ('shared_4', '4 shared + 4 of 60'),
    'half': ('half', '1 shared + 3 of 63: half of it active'),
  }
  found = {
    name: Arm(name, label, _variant(v), 'gshard' if name in COARSE else 'deepseekmoe')
    for name, (v, label) in ladder.items()
  }
  others = (
    Arm('aux', '2 shared + 6 of 64, sigmoid, balanced by a loss', _loss_free('aux'), 'loss_free'),
    Arm('aux_x10', '`aux` with ten times that loss', _strong_loss, 'loss_free'),
    Arm(
      'aux_normalised',
      '`aux` with scores divided by their sum in the loss, as DeepSeek-V3 has it',
      _normalised_loss,
      'loss_free',
    ),
    Arm(
      'loss_free',
      '2 shared + 6 of 64, sigmoid, balanced by a bias',
      _loss_free('loss_free'),
      'loss_free',
    ),
    Arm(
      'upcycled',
      'GShard, made of the trained `dense`: 16 copies of its FFN',
      _variant('gshard'),
      'gshard',
      start='dense',
    ),
    Arm('mha', 'DeepSeekMoE with multi-head attention', _mha, 'deepseekmoe'),
    Arm('mla', 'DeepSeekMoE with latent attention', _mla, 'mla'),
    Arm('mqa', 'DeepSeekMoE with one head of keys and values', _mqa, 'deepseekmoe'),
    Arm('mla_cache', 'DeepSeekMoE with latent attention of that cache', _mla_cache, 'mla'),
    *(
      Arm(
        f'm{m}',
        f'1 shared + {2 * m - 1} of {16 * m - 1}, 1/{m} as wide as a whole FFN, '
        + ('a gate of 1, which teaches the router nothing' if m == 1 else _DIVIDED),
        _normalised(16 * m - 1, 2 * m - 1, m),
        'm4',
        aside=f'm{m}' in ASIDE,
      )
      for m in SEGMENTS
    ),
    *(
      Arm(
        f'e{n}',
        f'1 shared + 7 of {n}, a quarter as wide, gates divided by their sum',
        _normalised(n, 7, 4),
        'm4',
      )
      for n in EXPERTS
      if n != 63  # that is m4
    ),
  )
  variants = [_routing_variant(name) for name in routing.VARIANTS if name not in SAME]
  return found | {arm.name: arm for arm in (*others, *variants)}


def _routing_variant(name: str) -> Arm:
  """A variant of `configs/routing.py`, which has them on the tiny model alone."""
  return Arm(
    RENAMED.get(name, name),
    routing.SUMMARY[name][0],
    lambda unused_scale: _page('routing.py', name),
    FAMILIES.get(name, 'deepseekmoe'),
    scales=('tiny',),
    aside=name in ASIDE,
  )


ARMS = _arms()
SIZES = ('total', 'activated')
BITS, VIO = 'bits_per_byte', 'max_vio'
DISABLED, FEWER, UNSHARED = 'rise_without_top_experts', 'bits_with_4_of_7', 'rise_without_shared'
FIGURES = {  # key of an arm's results -> (what it is, digits)
  BITS: ('held-out bits per byte', 4),
  VIO: ('MaxVio over the held-out text', 2),
  DISABLED: ('rise of held-out bits per byte when the best 1/16 of the experts are disabled', 3),
  FEWER: ('held-out bits per byte, with 4 in place of 7 routed experts in deepseekmoe', 4),
  UNSHARED: ('rise of held-out bits per byte when a routed expert stands in for the shared one', 3),
}
EQUAL_MARGIN = 0.005  # share of the baseline within which two losses count as equal

CLAIMS = (
  Claim('1_15', 'gshard', BITS, 'lower', 'isolating a shared expert helps (Figure 3)', SIZES),
  Claim('1_31', '1_15', BITS, 'lower', 'experts half as wide help (Figure 3)', SIZES),
  Claim('deepseekmoe', '1_31', BITS, 'lower', 'a quarter as wide helps again (Figure 3)', SIZES),
  Claim('deepseekmoe', 'gshard', BITS, 'lower', 'Pile loss 1.808 against 1.867', SIZES),
  Claim('m4', 'gshard', BITS, 'lower', 'the same, with gates divided by their sum in both', SIZES),
  Claim('deepseekmoe', 'gshard_x1.5', BITS, 'equal', '1.808 and 1.808: 1.5 times the experts'),
  Claim('deepseekmoe', 'dense_x16', BITS, 'equal', '1.808 and 1.806: the bound', ('total',)),
  Claim('gshard', 'switch', BITS, 'lower', '1.867 against 1.881', ('total',)),
  Claim('switch', 'hash', BITS, 'lower', '1.881 against 1.932', SIZES),
  Claim('hash', 'dense', BITS, 'lower', '1.932 against 2.060', ('activated',)),
  Claim(
    'upcycled',
    'gshard',
    BITS,
    'lower',
    'below twice the budget of the dense run upcycling is better than training anew (2406.06563)',
    SIZES,
  ),
  Claim('half', 'gshard', BITS, 'lower', 'better with half the experts active', ('total',)),
  Claim('shared_2', 'deepseekmoe', BITS, 'equal', '1.806 and 1.808', SIZES),
  Claim('shared_4', 'deepseekmoe', BITS, 'equal', '1.811 and 1.808', SIZES),
  Claim('loss_free', 'aux', BITS, 'lower', 'perplexity 9.50 against 9.56 (2408.15664)', SIZES),
  Claim('loss_free', 'aux', VIO, 'lower', 'MaxVio 0.04 against 0.72 (2408.15664)', SIZES),
  Claim(
    'loss_free',
    'aux_x10',
    BITS,
    'lower',
    'no choice between balance and perplexity, as the weight of a loss is one (2408.15664)',
    SIZES,
  ),
  Claim(
    'loss_free',
    'aux_normalised',
    BITS,
    'lower',
    'the same against a loss that balances as well (2408.15664)',
    SIZES,
  ),
  Claim(
    'aux_x10',
    'aux',
    BITS,
    'higher',
    'a stronger balance loss costs perplexity (2408.15664, Figure 2)',
    SIZES,
  ),
  Claim('sigmoid', 'deepseekmoe', BITS, 'lower', 'sigmoid gates beat softmax (2408.15664)', SIZES),
  Claim(
    'expert_choice',
    'expert_choice_shuffled',
    BITS,
    'lower',
    'choosing among later tokens leaks them: 10 % of the loss (2408.15664)',
    SIZES,
  ),
  Claim('mla', 'mha', BITS, 'lower', 'MLA is better than MHA (2405.04434)', SIZES, 0.03),
  Claim(
    'mla_cache',
    'mqa',
    BITS,
    'lower',
    'at the same cache: MLA is above MHA, and MHA above MQA (2405.04434)',
    ('cache',),
  ),
  Claim('deepseekmoe', 'gshard_x1.5', DISABLED, 'higher', 'less redundant experts (Figure 4)'),
  Claim('deepseekmoe', '', UNSHARED, 'higher', 'the shared expert is irreplaceable (4.4)'),
  Claim('deepseekmoe', 'gshard', FEWER, 'equal', '4 routed experts match GShard (Figure 5)'),
)
SWEEPS = (
  Sweep(
    'granularity',
    'Granularity at equal parameters and FLOPs',
    'm, parts of a conventional expert',
    # The only gate of m1, divided by itself, is 1: its router learns from the balance loss alone.
    {f'm{m}': float(m) for m in SEGMENTS if m > 1},
    SIZES,
  ),
  Sweep(
    'experts',
    'Number of experts at equal activation (1 + 7 active)',
    'routed experts',
    {'m4' if n == 63 else f'e{n}': float(n) for n in EXPERTS},
    ('activated',),
  ),
)


def choose(names: list[str], scale: str) -> list[Arm]:
  """The arms of these names; all of the scale, but for those aside, for an empty list.

  Raises:
    errors.InputError: an unknown name, or one that the scale has not.
  """
  there = [arm.name for arm in of_scale(scale)]
  for name in names:
    hint = errors.did_you_mean(name, there)
    errors.require(
      name in there,
      f'--arms: {name!r} is none of the arms of --scale={scale}: {", ".join(there)}{hint}',
    )
  usual = [name for name in there if not ARMS[name].aside]
  return [ARMS[name] for name in dict.fromkeys(names or usual)]


def of_scale(scale: str) -> list[Arm]:
  """All arms that a scale has."""
  return [arm for arm in ARMS.values() if scale in arm.scales]


def resolve(
  arm: Arm,
  scale: str,
  steps: int = 0,
  data_path: str = '',
  source: str = '',
  heldout_fraction: float | None = None,
) -> schema.Config:
  """The run of an arm at a scale.

  Args:
    arm: what to train.
    scale: key of `SCALES`.
    steps: training steps; 0 = those of the scale, or as the page says.
    data_path: of the text; '' = as the page says.
    source: kind of the text, `data.source`; '' = as the page says.
    heldout_fraction: `data.heldout_fraction`; None = as the page says.
  """
  values = arm.values(scale)
  steps = steps or SCALES[scale].steps
  if steps:
    # Warm-up, and what is done every so many steps, keep their share of a shorter run.
    share = min(steps / values.train.num_steps, 1.0)
    values.optim.warmup_steps = round(share * values.optim.warmup_steps)
    values.train.num_steps = steps
  if data_path:
    values.data.path = data_path
  if source:
    values.data.source = source
  if heldout_fraction is not None:
    values.data.heldout_fraction = heldout_fraction
  return cli.resolve(values)
