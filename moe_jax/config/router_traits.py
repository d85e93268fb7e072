"""What the library asks of a router, by name: `of(cfg.moe)`, never a comparison with the name.

Counts, plans, rules of a configuration, generation, export and analyses need to know how a router
behaves and not how it computes. They read it here, below every array. A router of the library is
one file `models/routers/<name>.py` and one entry of `LIBRARY`; one from outside of it brings its
traits along (`models.routers.register`).

Letters: E experts, K experts per token, T tokens that compete, L length of a row.
"""

import dataclasses
from collections.abc import Callable

from moe_jax import errors
from moe_jax.config import moe_config

MoEConfig = moe_config.MoEConfig


def one_row(moe: MoEConfig, row_length: int) -> int:
  """A chunk of one row."""
  del moe
  return row_length


def consecutive(moe: MoEConfig) -> bool:
  """A chunk of neighbouring tokens."""
  del moe
  return True


@dataclasses.dataclass(frozen=True)
class Bound:
  """How many tokens an expert takes at most, so that buffers of a fixed size hold them."""

  room: Callable[[MoEConfig, int], int]  # (cfg, T) -> tokens that one expert takes of a chunk
  chunk: Callable[[MoEConfig, int], int] = one_row  # (cfg, L) -> T, padding included
  consecutive: Callable[[MoEConfig], bool] = consecutive  # False: of tokens from anywhere
  exact: bool = False  # every expert takes `room` tokens of a chunk without padding, never fewer


def top_k(moe: MoEConfig, train: bool) -> int:
  """K experts per token."""
  del train
  return moe.num_experts_per_tok


def always(moe: MoEConfig) -> bool:
  """Whatever the options are."""
  del moe
  return True


def never(moe: MoEConfig) -> bool:
  """With none of the options."""
  del moe
  return False


def no_pruning(moe: MoEConfig) -> float:
  """Attention experts stay in use whatever their score."""
  del moe
  return 0.0


@dataclasses.dataclass(frozen=True)
class RouterTraits:
  """The behaviour of a router; the defaults promise nothing but K experts per token.

  Raises:
    errors.InputError: traits that contradict each other, or an unknown option.
  """

  causal: bool  # outside of training, a token's experts do not depend on later tokens
  what: str = ''  # one line for tables
  paper: str = ''  # arXiv id
  has_logits: bool = True  # False: no router weights, no scores
  ranked: bool = True  # every token has `active_experts` choices, the best first
  uses_selection: bool = False  # outside of training: the best K of `Inputs.selection`
  trains_by_selection: bool = False  # in training too: expert bias and limited groups hold
  gates_sum_to_scale: bool = False  # gates add up to routed_scaling_factor without norm_topk_prob
  ties_stay_together: bool = False  # equal scores are chosen together: upcycling may cut experts
  exports: bool = False  # a config.json of the DeepSeek families can describe it
  options: tuple[str, ...] = ()  # fields of `RouterOptions` that only such routers read
  # (cfg, train) -> routed experts that a token visits, on average; the most where data decide.
  active_experts: Callable[[MoEConfig, bool], int] = top_k
  # Score below which an expert of a mixture of attention heads is left out, outside of training.
  attention_threshold: Callable[[MoEConfig], float] = no_pruning
  # Whether a token's experts are the same in training and outside of it, whatever the batch holds.
  steady: Callable[[MoEConfig], bool] = always
  bound: Bound | None = None  # None: an expert may get any number of tokens
  check: Callable[[MoEConfig], None] | None = None  # raises InputError where cfg breaks a rule

  def __post_init__(self):
    errors.require(
      self.has_logits >= self.uses_selection >= self.trains_by_selection,
      f'RouterTraits(has_logits={self.has_logits}, uses_selection={self.uses_selection}, '
      f'trains_by_selection={self.trains_by_selection}): selection scores need logits, and who '
      'trains by them uses them; set the former to True, or the latter to False',
    )
    for option in self.options:
      errors.choice('model.moe.options', option, OPTIONS)

  def per_token(self, moe: MoEConfig) -> int:
    """Experts of a token outside of training: `active_experts`, or K where their number varies."""
    return self.active_experts(moe, False) if self.ranked else moe.num_experts_per_tok


OPTIONS = tuple(field.name for field in dataclasses.fields(moe_config.RouterOptions))


def _check_hash(moe: MoEConfig):
  errors.require(
    not moe.norm_topk_prob,
    f'config.model.moe.norm_topk_prob=True has no effect on router {moe.router!r}, whose gates are '
    '1 / K; set it to False',
  )


def _balanced_room(moe: MoEConfig, tokens: int) -> int:
  """floor(K T / E), at least 1."""
  return max(1, tokens * moe.num_experts_per_tok // moe.num_experts)


def _chunk_tokens(moe: MoEConfig, row_length: int) -> int:
  return moe.options.chunk_tokens or row_length


def _not_shuffled(moe: MoEConfig) -> bool:
  return not moe.options.shuffle_chunks


def _dense_training(moe: MoEConfig, train: bool) -> int:
  """All experts in training, and outside of it unless a rule keeps K on average."""
  sparse = not train and moe.options.inference.endswith('topk')
  return moe.num_experts_per_tok if sparse else moe.num_experts


def _trains_as_it_runs(moe: MoEConfig) -> bool:
  return moe.options.inference == 'all'


def _pruned_attention(moe: MoEConfig) -> float:
  """The threshold rule prunes attention experts too; the top-K rules keep them all."""
  return moe.options.inference_threshold if moe.options.inference == 'threshold' else 0.0


def _check_dense_training(moe: MoEConfig):
  errors.require(
    moe.capacity.policy == 'none' and moe.dispatch != 'capacity',
    f'config.model.moe.capacity.policy={moe.capacity.policy!r}: router {moe.router!r} trains every '
    "expert on every token and drops none; set it to 'none', with dispatch='dense'",
  )


def _check_skewed(moe: MoEConfig):
  errors.require(
    moe.num_experts_per_tok < moe.num_experts,
    f'config.model.moe.num_experts_per_tok={moe.num_experts_per_tok} must be below '
    f'model.moe.num_experts={moe.num_experts} with router {moe.router!r}; choose fewer',
  )


def _check_replay(moe: MoEConfig):
  path, rows = moe.options.replay_path, moe.options.replay_rows
  errors.require(
    bool(path) and rows > 0,
    f'config.model.moe.options.replay_path={path!r} and replay_rows={rows} must name the '
    f'assignments that router {moe.router!r} reads; experiments.routing --save makes such a file '
    'and says how many rows it has',
  )


# The registry: every router of the library, each a file of this name in models/routers/.
LIBRARY: dict[str, RouterTraits] = {
  'topk': RouterTraits(
    causal=True,
    what='the best K of the selection scores',
    paper='2401.06066',
    uses_selection=True,
    trains_by_selection=True,
    ties_stay_together=True,
    exports=True,
  ),
  'hash': RouterTraits(
    causal=True,
    what='a fixed table from token ids to experts, no router weights',
    paper='2106.04426',
    has_logits=False,
    gates_sum_to_scale=True,
    options=('hash_table',),
    check=_check_hash,
  ),
  'expert_choice': RouterTraits(
    causal=False,
    what='every expert takes its best tokens of a chunk',
    paper='2202.09368',
    ranked=False,
    ties_stay_together=True,
    options=('chunk_tokens', 'shuffle_chunks'),
    steady=never,
    bound=Bound(_balanced_room, _chunk_tokens, _not_shuffled, exact=True),
  ),
  'ds_moe': RouterTraits(
    causal=True,
    what='all experts in training, outside of it those that a rule leaves in use',
    paper='2404.05567',
    ranked=False,
    gates_sum_to_scale=True,
    ties_stay_together=True,
    options=('inference', 'inference_threshold'),
    active_experts=_dense_training,
    attention_threshold=_pruned_attention,
    steady=_trains_as_it_runs,
    check=_check_dense_training,
  ),
  'sinkhorn': RouterTraits(
    causal=True,
    what='balanced assignment by Sinkhorn iterations in training, plain top-K outside of it',
    paper='2202.01169',
    uses_selection=True,
    steady=never,
  ),
  'balanced': RouterTraits(causal=True, what='tokens are dealt to experts in turn', steady=never),
  'skewed': RouterTraits(
    causal=True,
    what='expert 0 is the first choice of a share of the tokens, the others are dealt in turn',
    options=('skew',),
    steady=never,
    check=_check_skewed,
  ),
  'replay': RouterTraits(
    causal=True,
    what='recorded assignments, read from a file',
    options=('replay_path', 'replay_rows'),
    steady=never,
    check=_check_replay,
  ),
}
REGISTERED: dict[str, RouterTraits] = {}  # by `models.routers.register`


def known() -> dict[str, RouterTraits]:
  """The traits of every router that a config may name."""
  return LIBRARY | REGISTERED


def of(moe: MoEConfig) -> RouterTraits:
  """The traits of the router that `moe` names.

  Raises:
    errors.InputError: there is none of that name.
  """
  there = known()
  errors.require(
    moe.router in there,
    f'config.model.moe.router={moe.router!r} must be one of {", ".join(there)}'
    f'{errors.did_you_mean(moe.router, there)}; one from outside of the library is known where '
    'routers.register has been called',
  )
  return there[moe.router]


def names_with(trait: str) -> list[str]:
  """The routers whose `trait` is true."""
  return [name for name, traits in known().items() if getattr(traits, trait)]
