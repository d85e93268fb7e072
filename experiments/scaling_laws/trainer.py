"""Trains one model of the study many times, with one compiled step.

`optimizer_step.make_train_step` has rate, length and batch size in its program, and compiling it
takes longer than most points of the tiny study. Here the rate and the number of micro-batches are
arguments: AdamW's update is linear in the rate, decay included, and a batch is a sum over
micro-batches of one shape. The loss is `objective.batch_loss`, and a test holds the step to
`optimizer_step.make_train_step`. Routing keeps no state in the study's pages, and none is moved.
"""

import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import errors, integer_hash
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import batch_sizes, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import packing, pipeline
from moe_jax.devices import partitioning
from moe_jax.training import evaluate, objective, optim, stop_signal, train_state

Array = jax.Array


# Level 1 compiles in three quarters of the time and runs these small programs no slower.
_CPU_OPTIONS = {'xla_backend_optimization_level': 1}
EVALUATION_ROWS = 64  # one shape for all points


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What the points of one model differ in."""

  num_steps: int
  rows: int  # per step, a multiple of `train.micro_batch_size`
  peak_lr: float
  warmup_steps: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a finished point brings."""

  loss: float  # held out, nats per token
  bits_per_byte: float
  seconds: float  # of the training steps, over all starts


def make_step(cfg: schema.Config, mesh: jax.sharding.Mesh) -> Any:
  """The jitted step (state, batch, num_micro, rate) -> (state, loss); the state is donated.

  `batch` holds arrays [K, R, T] of K micro-batches of R rows, of which the first `num_micro` count;
  the loss is their mean cross-entropy. Trace and call it under `partitioning.activate(mesh)`.
  """
  # Rate 1 for the whole run: the real one multiplies what comes out.
  of_rate_one = dataclasses.replace(cfg.optim, peak_lr=1.0, schedule='constant', warmup_steps=0)
  optimizer = optim.optimizer(of_rate_one, 1)

  def step(state: train_state.TrainState, batch: objective.Batch, num_micro: Array, rate: Array):
    seed = integer_hash.combine(state.seed, state.step)

    def count(real):
      return jnp.maximum(real.sum(), 1)

    totals = objective.Totals(count(batch['targets'] >= 0), count(batch['segment_ids'] > 0))

    def share(i: Array) -> tuple[Array, Any]:
      micro = jax.tree.map(lambda x: x[i], batch)
      rows = len(micro['tokens'])
      micro['row'] = i * rows + jnp.arange(rows, dtype=jnp.int32)

      def loss_fn(p):
        return objective.batch_loss(cfg, p, state.router_state, micro, seed, totals)

      (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
      return loss.main, grads

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(share, 0))

    def add(i, total):
      return jax.tree.map(jnp.add, total, share(i))

    loss, grads = jax.lax.fori_loop(0, num_micro, add, zeros)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: rate * u, updates))
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

  options = _CPU_OPTIONS if mesh.devices.flat[0].platform == 'cpu' else None
  return jax.jit(step, donate_argnums=0, compiler_options=options)


def rates(cfg: schema.OptimConfig, recipe: Recipe) -> np.ndarray:
  """[num_steps] float32, the learning rate of every step."""
  cfg = dataclasses.replace(cfg, peak_lr=recipe.peak_lr, warmup_steps=recipe.warmup_steps)
  # A power of two steps, so that jax compiles the schedule's operations for few shapes.
  padded = np.arange(2 ** math.ceil(math.log2(recipe.num_steps)), dtype=np.int32)
  schedule = optim.learning_rate(cfg, recipe.num_steps)
  return np.asarray(schedule(padded), np.float32)[: recipe.num_steps]


class Trainer:
  """Everything that the points of one model share.

  Args:
    cfg: a page; its length, batch, rate, warm-up and seed give way to those of each recipe.
    corpus: its text.
    max_rows: largest batch of any recipe.

  Raises:
    errors.InputError: the page has steps skipped.
  """

  def __init__(self, cfg: schema.Config, corpus: corpus_lib.Corpus, max_rows: int):
    errors.require(
      not cfg.optim.spike_sigma,
      f'config.optim.spike_sigma={cfg.optim.spike_sigma} skips steps, and the step of this study '
      'skips none; set optim.spike_sigma=0 in its page',
    )
    self._cfg, self._corpus = cfg, corpus
    self._mesh = partitioning.make_mesh(cfg.mesh, jax.devices()[:1])
    self._micro_rows = cfg.train.micro_batch_size
    self._max_micro = -(-max_rows // self._micro_rows)
    self._step = None  # compiled by the first point
    self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    self._starts = {}  # by seed

  def run(
    self, recipe: Recipe, directory: pathlib.Path, stop: stop_signal.StopSignal
  ) -> Outcome | None:
    """Trains and evaluates one point; goes on from a checkpoint in `directory` if there is one.

    Returns:
      None if a signal came first; the state is then saved.
    """
    rate, meta = rates(self._cfg.optim, recipe), {'recipe': dataclasses.asdict(recipe)}
    num_micro = np.int32(recipe.rows // self._micro_rows)
    with contextlib.ExitStack() as stack, partitioning.activate(self._mesh):

      def open_one():
        return stack.enter_context(checkpointer_lib.Checkpointer(directory, self._cfg.checkpoint))

      # Most points are over before their first save is due, and never make the directory.
      checkpointer = open_one() if directory.exists() else None
      state, start, seconds = self._first_state(recipe, checkpointer)
      self._compile(state)
      began = time.perf_counter()
      for step, batch in enumerate(self._batches(recipe, start), start=start + 1):
        state, _ = self._step(state, batch, num_micro, rate[step - 1])
        due = step % self._cfg.checkpoint.save_every == 0
        if step < recipe.num_steps and (due or stop.name):
          checkpointer = checkpointer or open_one()
          spent = seconds + time.perf_counter() - began
          checkpointer.save(step, state, {**meta, 'seconds': spent}, force=True)
          if stop.name:
            return None
      jax.block_until_ready(state)
    seconds += time.perf_counter() - began
    found = self._evaluate(state)
    shutil.rmtree(directory, ignore_errors=True)
    return Outcome(found.loss, found.bits_per_byte, seconds)

  def _compile(self, state: train_state.TrainState):
    """Before the clock runs."""
    if self._step is None:
      shape = (self._max_micro, self._micro_rows, self._cfg.model.max_seq_len)
      batch = {key: np.zeros(shape, np.int32) for key in objective.BATCH_KEYS}
      step = make_step(self._cfg, self._mesh)
      self._step = step.lower(state, batch, np.int32(1), np.float32(0)).compile()

  def _batches(self, recipe: Recipe, start: int) -> Iterator[dict[str, np.ndarray]]:
    """Arrays [K, R, T], the micro-batches beyond those of the recipe all padding."""
    length, rows = self._cfg.model.max_seq_len, self._micro_rows
    padding = packing.padding_row(length)
    for batch in pipeline.train_batches(
      self._corpus,
      seed=recipe.seed,
      max_seq_len=length,
      batch_sizes=batch_sizes.BatchSizes(recipe.rows),
      start_step=start,
      num_steps=recipe.num_steps,
    ):
      whole = {}
      for key in objective.BATCH_KEYS:
        fill = np.tile(padding[key], (self._max_micro * rows - recipe.rows, 1))
        whole[key] = np.concatenate([batch[key], fill]).reshape(-1, rows, length)
      yield whole

  def _first_state(
    self, recipe: Recipe, checkpointer: checkpointer_lib.Checkpointer | None
  ) -> tuple[train_state.TrainState, int, float]:
    """(state, steps done, seconds they took).

    A fresh state is made once per seed: compiling what makes it takes longer than a point.
    """
    if checkpointer is not None:
      found = checkpointer.restore(train_state.abstract_state(self._cfg, self._mesh))
      if found is not None:
        errors.require(
          found.meta['recipe'] == dataclasses.asdict(recipe),
          f'--workdir holds a point trained as {found.meta["recipe"]}, which is now {recipe}; use '
          'another --workdir',
        )
        return found.state, found.step, found.meta['seconds']
    if recipe.seed not in self._starts:
      settings = dataclasses.replace(self._cfg.train, seed=recipe.seed)
      cfg = dataclasses.replace(self._cfg, train=settings)
      self._starts[recipe.seed] = train_state.init_state(cfg, self._mesh)
    return self._copy(self._starts[recipe.seed]), 0, 0.0

  def _evaluate(self, state: train_state.TrainState) -> evaluate.Evaluation:
    settings = dataclasses.replace(self._cfg.train, batch_size=EVALUATION_ROWS, micro_batch_size=0)
    cfg = dataclasses.replace(self._cfg, train=settings)
    return evaluate.evaluate(cfg, state.variables, self._corpus, self._mesh)
