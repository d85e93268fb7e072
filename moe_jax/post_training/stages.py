"""The stage that makes a run's batches, where they are no rows of its corpus."""

from moe_jax.config import schema
from moe_jax.runs import fit


def of(cfg: schema.Config) -> fit.Stage | None:
  """The stage of a run; None for one that learns from the rows of its corpus.

  Raises:
    errors.InputError: see the stages.
  """
  # Imported when asked for: other runs start sooner without what rewards are drawn and shown with.
  if cfg.objective.kind == 'policy':
    from moe_jax.post_training import policy_stage

    return policy_stage.PolicyStage(cfg)
  if cfg.objective.kind == 'process_reward':
    from moe_jax.post_training import process_stage

    return process_stage.ProcessStage(cfg)
  return None
