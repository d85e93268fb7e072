"""A few training steps from the same files and batch: this project's, and transformers with torch.

Theirs is written out: mean next-token cross-entropy, clipping by global norm, torch's AdamW with
decay on matrices only.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from torch.nn import functional

from configs import base
from experiments.parity import hf_models
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface
from moe_jax.training import optim, optimizer_step, train_state

STEPS, LR, DECAY, CLIP = 3, 1e-2, 0.1, 1.0
# AdamW divides a gradient by its own size + eps, so that rounding errors of 1e-9 in a gradient that
# should be 0 become 1e-9 / eps of a whole step: 0.1 with the usual 1e-8. The clipped gradients here
# are about 5e-3, so that 1e-3 leaves most of them a good part of their sign-like step.
EPS = 1e-3

# (Case of hf_models, changes to its config.json). The last weighs the balance loss so much that it
# changes the gradient's norm by a tenth.
CASES = {
  'llama': ('llama_gqa', {}),
  'llama_tied': ('llama_tied', {}),
  'deepseek_v2': ('v2_no_yarn', {}),
  'deepseek_v3': ('v3', {}),
  'deepseek_v2_balanced': ('v2_no_yarn', {'aux_loss_alpha': 0.5, 'seq_aux': True}),
}


class Trained(NamedTuple):
  """What a program did; one entry per step."""

  loss: list[float]  # cross-entropy
  aux_loss: list[float]  # balance losses with their weights
  grad_norm: list[float]  # before clipping
  weights: dict[str, np.ndarray]  # after the last step, by their names in the files


def measure(name: str, directory: pathlib.Path, **changes) -> tuple[dict, Trained, Trained]:
  """(weights before, ours, theirs) of a case of `hf_models`, with changes to its config.json."""
  saved = directory / 'saved'
  hf_models.make(name, saved, **changes)
  return _weights(saved), ours(saved, directory / 'ours'), theirs(name, saved, directory / 'theirs')


def _weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
  loaded = safetensors.torch.load_file(directory / 'model.safetensors')
  return {name: tensor.numpy() for name, tensor in loaded.items()}


def _values() -> dict[str, Any]:
  page = base.get_config()
  optimizer = {'peak_lr': LR, 'schedule': 'constant', 'warmup_steps': 0, 'eps': EPS}
  page.optim.update(optimizer | {'weight_decay': DECAY, 'clip_norm': CLIP})
  page.train.update({'num_steps': STEPS, 'batch_size': hf_models.ROWS})
  page.model.moe.expert_bias.update_rate = 0.0  # torch's model leaves the biases as they are
  page.mesh.data = 1
  return page.to_dict()


def ours(saved: pathlib.Path, into: pathlib.Path) -> Trained:
  """`STEPS` steps of `optimizer_step.make_train_step`; the weights go through the exporter."""
  cfg, variables = huggingface.load_variables(saved, _values())
  opt_state = optim.optimizer(cfg.optim, STEPS).init(variables['params'])
  state = train_state.TrainState(jnp.int32(0), jnp.uint32(0), opt_state=opt_state, **variables)
  step = _compiled_step(cfg, state)
  found = Trained([], [], [], {})
  for _ in range(STEPS):
    state, metrics = step(state, _batch())
    found.loss.append(float(metrics.loss))
    found.aux_loss.append(float(metrics.aux_loss))
    found.grad_norm.append(float(metrics.grad_norm))
  huggingface.save(cfg, state.variables, into)
  return found._replace(weights=_weights(into))


def _compiled_step(cfg: schema.Config, state: train_state.TrainState):
  mesh = partitioning.make_mesh(cfg.mesh, jax.devices()[:1])
  with partitioning.activate(mesh):
    lowered = optimizer_step.make_train_step(cfg, mesh).lower(state, _batch())
  return lowered.compile(compiler_options={'xla_backend_optimization_level': 0})


def _batch() -> dict[str, np.ndarray]:
  ids = hf_models.tokens()
  rows, length = ids.shape
  return {
    'tokens': ids,
    'targets': np.concatenate([ids[:, 1:], np.full((rows, 1), -1, np.int32)], axis=1),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    'segment_ids': np.ones_like(ids),
  }


def theirs(name: str, saved: pathlib.Path, into: pathlib.Path) -> Trained:
  """The same with torch."""
  model = hf_models.load_theirs(name, saved).train()
  matrices = [weight for weight in model.parameters() if weight.ndim > 1]
  scales = [weight for weight in model.parameters() if weight.ndim == 1]
  groups = [
    {'params': matrices, 'weight_decay': DECAY},
    {'params': scales, 'weight_decay': 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS)
  routed = []
  for gate in hf_models.gates(model):
    gate.register_forward_hook(lambda gate, args, out: routed.append((out[0], out[2])))
  ids = torch.from_numpy(hf_models.tokens()).long()
  found = Trained([], [], [], {})
  for _ in range(STEPS):
    routed.clear()
    logits = model(ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    alpha = getattr(model.config, 'aux_loss_alpha', 0.0)
    aux = sum((alpha * sequence_loss(*layer) for layer in routed), torch.zeros(()))
    optimizer.zero_grad()
    (loss + aux).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    found.loss.append(loss.item())
    found.aux_loss.append(aux.item())
    found.grad_norm.append(norm.item())
  model.save_pretrained(into)
  return found._replace(weights=_weights(into))


def sequence_loss(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
  """The released code's balance loss of a layer, for softmax scores, without its weight.

  Per sequence sum_i f_i P_i, f_i = E / (K L) * tokens that chose i, P_i the mean score; then the
  mean over sequences. logits [B * L, E], experts [B * L, K].
  """
  rows, num_experts, k = hf_models.ROWS, logits.shape[-1], experts.shape[-1]
  scores = logits.softmax(-1).view(rows, -1, num_experts)
  counts = functional.one_hot(experts.view(rows, -1), num_experts).sum(1).float()
  frequency = counts * num_experts / (k * scores.shape[1])
  return (frequency * scores.mean(1)).sum(-1).mean()
