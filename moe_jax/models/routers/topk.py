"""Best K of the selection scores: DeepSeekMoE, V2, V3, loss-free, GShard, Switch, Skywork-MoE.

They differ in score function, bias, groups and normalisation, which are settings and not code:
DeepSeekMoE (arXiv 2401.06066, Eq. 9-11) is the raw softmax; GShard and Skywork-MoE divide two gates
by their sum; Switch keeps one raw gate, since a renormalised single one would have no gradient.
"""

from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing


def route(inputs: routing.Inputs, cfg: moe_config.MoEConfig, train: bool) -> routing.Routing:
  """Chooses by `selection`, weighs by `scores`."""
  del train
  expert_idx = routing.keep_best(inputs.selection, cfg.num_experts_per_tok)
  gates = routing.gates_of(inputs.scores, expert_idx, cfg)
  return routing.Routing(gates, expert_idx, inputs.scores)


ROUTER = routing.Router(route, router_traits.LIBRARY['topk'], per_token=True)
