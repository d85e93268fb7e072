"""What the experts of a trained model learned: one function per question, behind one table."""

from collections.abc import Callable

from moe_jax.analysis.probes import (
  ablation,
  coactivation,
  confidence,
  dependence,
  probe_types,
  saturation,
  traffic,
  weights,
)

PROBES: dict[str, Callable[[probe_types.Context], probe_types.Finding]] = {
  'disable_top': ablation.disable_top,
  'drop_shared': ablation.drop_shared,
  'fewer_experts': ablation.fewer_experts,
  'domains': dependence.domains,
  'tokens_and_places': dependence.tokens_and_places,
  'vocabulary': dependence.vocabulary,
  'coactivation': coactivation.coactivation,
  'saturation': saturation.saturation,
  'expert_weights': weights.expert_weights,
  'confidence': confidence.confidence,
  'traffic': traffic.traffic,
}
