"""Gradients of SFT and DPO from the same files and answers: this project's, and torch's.

Theirs is written out as the usual trainers have it: one sequence per row, labels shifted by one,
log-probabilities summed over the answer, the reference's taken as given.
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
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface
from moe_jax.training import objective

BETA, SMOOTHING, SFT_WEIGHT = 0.3, 0.1, 0.5
KINDS = ('sft', 'dpo')
# Log-probabilities under the reference, of rows 0, 1, ...: any numbers of the right size do.
OFFSETS = (0.7, -0.4, -1.1, 0.2)


class Found(NamedTuple):
  """Loss, and gradients by the names of the files."""

  loss: float
  gradients: dict[str, np.ndarray]


def measure(kind: str, name: str, directory: pathlib.Path) -> tuple[Found, Found]:
  """(ours, theirs) of a case of `hf_models`."""
  saved = directory / 'saved'
  hf_models.make(name, saved)
  their, log_probs = theirs(kind, name, saved)
  return ours(kind, saved, directory / 'ours', log_probs), their


def _answers() -> tuple[np.ndarray, np.ndarray]:
  """(ids [rows, L], whether each is learned): answers begin at another place in every row."""
  ids = hf_models.tokens()
  starts = 3 + 2 * np.arange(len(ids))[:, None]
  return ids, np.arange(ids.shape[1])[None] >= starts


def _reference(log_probs: np.ndarray) -> np.ndarray:
  return (log_probs + np.resize(OFFSETS, len(log_probs))).astype(np.float32)


def ours(kind: str, saved: pathlib.Path, into: pathlib.Path, log_probs: np.ndarray) -> Found:
  """By `objective.gradients`; a pair, rows 2 k and 2 k + 1, lies in one row."""
  page: Any = base.get_config()
  page.mesh.data = 1
  page.data.source = {'sft': 'arithmetic', 'dpo': 'preferences'}[kind]
  page.init_from = 'elsewhere'
  page.objective.kind = kind
  page.objective.dpo.update(beta=BETA, label_smoothing=SMOOTHING, sft_weight=SFT_WEIGHT)
  cfg, variables = huggingface.load_variables(saved, page.to_dict())
  cfg = parse.from_dict(parse.to_dict(cfg))
  ids, learned = _answers()
  rows, length = ids.shape
  batch = {
    'tokens': ids,
    'targets': np.pad(np.where(learned, ids, -1)[:, 1:], ((0, 0), (0, 1)), constant_values=-1),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    'segment_ids': np.ones_like(ids),
  }
  if kind == 'dpo':
    batch['segment_ids'][1::2] = 2
    batch['reference'] = np.zeros(ids.shape, np.float32)
    batch['reference'][:, 0] = _reference(log_probs)
    batch = {key: value.reshape(rows // 2, 2 * length) for key, value in batch.items()}
  mesh = partitioning.make_mesh(cfg.mesh, jax.devices()[:1])
  with partitioning.activate(mesh):
    loss, grads = jax.jit(
      lambda variables: objective.gradients(
        cfg, variables['params'], variables['router_state'], batch, jnp.uint32(0)
      ),
      compiler_options={'xla_backend_optimization_level': 0},
    )(variables)
  total = float(loss.main)
  if kind == 'dpo':
    # The SFT term, which the log shows as part of nothing, from the log-probabilities.
    total -= SFT_WEIGHT * log_probs[::2].sum() / learned[::2].sum()
  huggingface.save(cfg, {**variables, 'params': grads}, into)
  loaded = safetensors.torch.load_file(into / 'model.safetensors')
  return Found(total, {key: tensor.numpy() for key, tensor in loaded.items()})


def theirs(kind: str, name: str, saved: pathlib.Path) -> tuple[Found, np.ndarray]:
  """The same with torch; also the log-probabilities of the answers."""
  model = hf_models.load_theirs(name, saved).train()
  ids, learned = (torch.from_numpy(a) for a in _answers())
  logits = model(ids.long(), use_cache=False).logits[:, :-1]
  labels, mask = ids[:, 1:].long(), learned[:, 1:]
  per_token = torch.gather(logits.log_softmax(-1), 2, labels[..., None])[..., 0] * mask
  log_probs = per_token.sum(-1)
  if kind == 'sft':
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.masked_fill(~mask, -100).flatten())
  else:
    ratios = log_probs - torch.from_numpy(_reference(log_probs.detach().numpy()))
    margin = BETA * (ratios[::2] - ratios[1::2])
    right, wrong = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    loss = (-(1 - SMOOTHING) * right - SMOOTHING * wrong).mean()
    loss = loss - SFT_WEIGHT * log_probs[::2].sum() / mask[::2].sum()
  loss.backward()
  found = {
    key: np.zeros(tuple(value.shape), np.float32) if value.grad is None else value.grad.numpy()
    for key, value in model.named_parameters()
  }
  return Found(loss.item(), found), log_probs.detach().numpy()
