"""The stage that makes a run's batches, where they are no rows of its corpus."""

from moe_jax.config import schema
from moe_jax.post_training import policy_stage, process_stage
from moe_jax.runs import fit

STAGES = {
  'policy': policy_stage.PolicyStage,
  'process_reward': process_stage.ProcessStage,
}


def of(cfg: schema.Config) -> fit.Stage | None:
  """The stage of a run; None for one that learns from the rows of its corpus.

  Raises:
    errors.InputError: see the stages.
  """
  stage = STAGES.get(cfg.objective.kind)
  return None if stage is None else stage(cfg)
