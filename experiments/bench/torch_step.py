"""A training step of transformers with torch, from the weights of one of our models.

transformers and torch (extra `hf`) are imported where they are used.
"""

import tempfile
from collections.abc import Callable

import jax
import numpy as np

from experiments.bench import torch_threads
from experiments.common import stepper
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface
from moe_jax.models import model_variables

EXPERTS = (
  'grouped_mm'  # the faster of its implementations: its loop over experts takes twice as long
)


def make_step(cfg: schema.Config, experts: str = EXPERTS) -> Callable[[int], float]:
  """Forward, cross-entropy, backward, clipping and AdamW, all in float32.

  Args:
    cfg: the run; its model must be one that transformers has, see `huggingface.save`.
    experts: transformers' `experts_implementation`.

  Returns:
    (number of the round) -> the loss; batches are those of `stepper.rows` in turn. torch runs on
    as many threads as were found to be faster.
  """
  import torch
  import transformers
  from torch.nn import functional

  variables = model_variables.init(cfg.model, jax.random.key(cfg.train.seed))
  variables = jax.tree.map(np.asarray, partitioning.unbox(variables))
  with tempfile.TemporaryDirectory() as directory:
    huggingface.save(cfg, variables, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, local_files_only=True, experts_implementation=experts
    ).train()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=cfg.optim.peak_lr,
    betas=(cfg.optim.beta1, cfg.optim.beta2),
    eps=cfg.optim.eps,
    weight_decay=cfg.optim.weight_decay,
    fused=True,
  )
  ids = [
    torch.from_numpy(stepper.rows(cfg, i)['tokens']).long() for i in range(stepper.NUM_BATCHES)
  ]

  def run(number: int) -> float:
    batch = ids[number % len(ids)]
    logits = model(batch, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
    optimizer.step()
    return loss.item()

  torch_threads.use_best(run)
  return run
