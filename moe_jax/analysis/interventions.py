"""A trained model with parts of it taken away: how much it loses says what they were for.

DeepSeekMoE's experiments (arXiv 2401.06066, section 4.5): the best routed experts of every token
disabled and the top K taken of the rest (Figure 4), a routed expert in place of the shared one, and
fewer experts per token than in training (Figure 5). Everything is evaluation only; the weights stay
what they are. What is measured is `evaluate.evaluate` on the held-out split.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import errors, trees
from moe_jax.analysis import assignments
from moe_jax.config import router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.models import moe_layer
from moe_jax.runs import overrides
from moe_jax.training import evaluate


class Subject(NamedTuple):
  """A trained model and the text it is measured on."""

  cfg: schema.Config
  variables: trees.Variables  # params and router_state
  corpus: corpus_lib.Corpus
  mesh: jax.sharding.Mesh


def measure(
  subject: Subject,
  *,
  disabled: Sequence[int] | None = None,
  shared_scale: Sequence[float] | None = None,
  num_experts_per_tok: int | None = None,
) -> evaluate.Evaluation:
  """Held-out figures under an intervention; without any, those of the model as it is.

  Args:
    subject: the model.
    disabled: per MoE layer, how many of a token's best routed experts it may not use.
    shared_scale: per MoE layer, what the shared experts' output is multiplied by; 0 drops them.
    num_experts_per_tok: K, if not that of training.

  Raises:
    errors.InputError: the model has nothing that could be taken away, or not enough would be left.
  """
  cfg = subject.cfg
  assignments.check(cfg.model)
  if num_experts_per_tok is not None:
    cfg = overrides.changed(cfg, {'model.moe.num_experts_per_tok': num_experts_per_tok})
  model, layers = cfg.model, cfg.model.num_moe_layers
  disabled = [0] * layers if disabled is None else list(disabled)
  shared_scale = [1.0] * layers if shared_scale is None else list(shared_scale)
  errors.require(
    len(disabled) == len(shared_scale) == layers,
    f'disabled={disabled} and shared_scale={shared_scale} must have an entry for each of the '
    f'{layers} MoE layers',
  )
  variables = subject.variables
  if any(disabled) or any(scale != 1 for scale in shared_scale):
    _check(model.moe, disabled, shared_scale)
    arrays = {
      'disabled': jnp.asarray(disabled, jnp.int32),
      'shared_scale': jnp.asarray(shared_scale, jnp.float32),
    }
    tree = {'moe_layers': {'moe': {moe_layer.INTERVENTION: arrays}}}
    variables = {**variables, moe_layer.INTERVENTION: tree}
  return evaluate.evaluate(cfg, variables, subject.corpus, subject.mesh)


def _check(cfg: Any, disabled: Sequence[int], shared_scale: Sequence[float]):
  per_token = router_traits.of(cfg).per_token(cfg)
  most = cfg.num_experts - per_token
  errors.require(
    not any(disabled) or router_traits.of(cfg).uses_selection,
    f'config.model.moe.router={cfg.router!r} does not rank the experts of a token, so that none '
    'can be disabled as its best',
  )
  errors.require(
    all(0 <= number <= most for number in disabled),
    f'disabled={list(disabled)} must be at most {most} in each layer: '
    f'config.model.moe.num_experts={cfg.num_experts} less the {per_token} of a token',
  )
  errors.require(
    cfg.num_shared_experts > 0 or all(scale == 1 for scale in shared_scale),
    'config.model.moe.num_shared_experts=0: this model has no shared expert to drop',
  )


def num_disabled(cfg: schema.Config, share: float) -> int:
  """How many experts a share of the routed ones is: 1/16 of 63 is 4, as of 64 (Figure 4)."""
  return round(share * cfg.model.moe.num_experts)


def without_best(subject: Subject, share: float) -> evaluate.Evaluation:
  """The best `share` of the routed experts of every token disabled, in all layers (Figure 4)."""
  number = num_disabled(subject.cfg, share)
  return measure(subject, disabled=[number] * subject.cfg.model.num_moe_layers)


def without_shared(subject: Subject, *, stand_in: bool) -> evaluate.Evaluation:
  """The shared experts dropped in all layers.

  Args:
    subject: the model.
    stand_in: whether every token gets as many routed experts more, as in the paper (1.808 -> 2.414
      of Pile loss), so that the activated parameters stay the same.
  """
  model = subject.cfg.model
  more = model.moe.num_experts_per_tok + model.moe.num_shared_experts
  return measure(
    subject,
    shared_scale=[0.0] * model.num_moe_layers,
    num_experts_per_tok=more if stand_in else None,
  )


def with_fewer(subject: Subject, num_experts_per_tok: int) -> evaluate.Evaluation:
  """Fewer routed experts per token than in training (Figure 5)."""
  return measure(subject, num_experts_per_tok=num_experts_per_tok)


def of_layer(model: schema.ModelConfig, layer: int, value: Any, rest: Any) -> list[Any]:
  """`value` for one MoE layer, `rest` for all others."""
  return [value if i == layer else rest for i in range(model.num_moe_layers)]


def on_sample(subject: Subject, num_tokens: int) -> Subject:
  """The same model on about so many tokens of the held-out split; 0 = on all of it."""
  if not num_tokens:
    return subject
  heldout = subject.corpus.heldout.sample(num_tokens)
  return subject._replace(corpus=dataclasses.replace(subject.corpus, heldout=heldout))
