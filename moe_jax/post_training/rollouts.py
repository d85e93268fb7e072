"""Answers that a policy writes in groups: every question is read once, and its answers share that.

Two programs of fixed shapes: one reads all questions and keeps their caches; one decodes `rows`
answers for some steps. Between two pieces of decoding the rows that have ended are handed the next
answers that wait, each with the cache of its question. An answer's tokens are a pure function of
(seed, iteration, question, answer, place), whatever stands beside it, and whatever `rows` is.

What is kept of every token: its id, its log-probability under the policy as it is sampled
(tempered, as it is trained; of greedy answers at temperature 1) and as the model has it, the
entropy of the draw, and the experts that were chosen for every token that was read, the question's
included.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.inference import cached_model, generate, sampling
from moe_jax.processes import agreement

Array = jax.Array

PIECE = 16  # steps between two looks at which rows have ended


class Answer(NamedTuple):
  """One answer to one question."""

  question: int  # number of the question in its batch
  prompt: list[int]
  tokens: list[int]  # written, with the end token if it came
  ended: bool  # whether the end token came within the limit
  log_probs: np.ndarray  # [n] float32, of `tokens` under the tempered policy, nats
  model_log_probs: np.ndarray  # [n] float32, at temperature 1
  entropy: np.ndarray  # [n] float32, of each draw, nats
  # [MoE layers, prompt + n - 1, K] int32, of all tokens that were read; None for a dense model.
  experts: np.ndarray | None


def places_of(answer: Answer, at: int) -> slice:
  """Where an answer's tokens are targets in its row, whose first token is at `at`."""
  first = at + len(answer.prompt) - 1
  return slice(first, first + len(answer.tokens))


class Rollouts(NamedTuple):
  """The answers of an iteration, those to one question side by side."""

  answers: list[Answer]
  seconds: float

  @property
  def num_tokens(self) -> int:
    return sum(len(one.tokens) for one in self.answers)


class _Questions(NamedTuple):
  """What all answers to each of P questions share."""

  length: Array  # [P] int32
  logits: Array  # [P, V] float32, behind the last token
  experts: Array | None  # [layers, P, L, K]
  caches: cached_model.Caches  # arrays [P, slots, ...]


class _Rows(NamedTuple):
  """Answers that are being written; `num_new` slots each."""

  token: Array  # [R] int32, drawn and not read
  position: Array  # [R] int32, of `token`
  count: Array  # [R] int32, tokens drawn
  key: Array  # [R] uint32, decides the draws of the answer
  done: Array  # [R] bool; so is a row without an answer
  tokens: Array  # [R, num_new] int32, -1 where nothing is written
  scores: Array  # [R, num_new, 3] float32: log-probability, that of the model, entropy
  experts: Array | None  # [layers, R, num_new, K], chosen when the token of that place was read
  caches: cached_model.Caches


@functools.partial(jax.jit, static_argnames=('cfg', 'num_slots'))
def _read(
  weights: cached_model.Weights,
  prompt: Array,
  length: Array,
  *,
  cfg: schema.ModelConfig,
  num_slots: int,
) -> _Questions:
  """Reads the questions [P, L]."""
  out = cached_model.prefill(cfg, weights, prompt, length, num_slots, keep_experts=cfg.is_moe)
  last = jnp.take_along_axis(out.hidden, (length - 1)[:, None, None], axis=1)
  logits = cached_model.logits_of(cfg, weights, last)[:, 0]
  return _Questions(length, logits, out.experts, out.caches)


def _draw(rows: _Rows, logits: Array, temperature: float, active: Array) -> _Rows:
  """Draws the next token of every active row from the model's logits [R, V]."""

  def one(key, count, logits):
    return jax.random.categorical(jax.random.fold_in(jax.random.key(key), count), logits)

  tempered = jax.nn.log_softmax(logits / (temperature or 1.0))
  token = jax.vmap(one)(rows.key, rows.count, tempered) if temperature else jnp.argmax(logits, -1)
  token = token.astype(jnp.int32)
  entropy = -(jnp.exp(tempered) * jnp.where(tempered > -jnp.inf, tempered, 0.0)).sum(-1)

  def of_token(log_probs: Array) -> Array:
    return jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]

  scores = jnp.stack([of_token(tempered), of_token(jax.nn.log_softmax(logits)), entropy], axis=-1)
  at = jnp.arange(len(token)), rows.count
  return rows._replace(
    token=jnp.where(active, token, rows.token),
    count=rows.count + active,
    tokens=rows.tokens.at[at].set(
      jnp.where(active, token, rows.tokens.at[at].get(mode='clip')), mode='drop'
    ),
    scores=rows.scores.at[at].set(
      jnp.where(active[:, None], scores, rows.scores.at[at].get(mode='clip')), mode='drop'
    ),
  )


@functools.partial(jax.jit, static_argnames=('temperature',), donate_argnames='rows')
def _hand_out(
  rows: _Rows, questions: _Questions, question: Array, key: Array, *, temperature: float
) -> _Rows:
  """Gives new answers to rows: question [R] int32 (-1: the row goes on as it is), key [R]."""
  new = question >= 0
  which = jnp.maximum(question, 0)

  def chosen(mine: Array, theirs: Array) -> Array:
    wide = new.reshape(-1, *[1] * (mine.ndim - 1))
    return jnp.where(wide, jnp.take(theirs, which, axis=0), mine)

  caches = jax.tree.map(chosen, rows.caches, questions.caches)
  rows = rows._replace(
    position=jnp.where(new, questions.length[which], rows.position),
    count=jnp.where(new, 0, rows.count),
    key=jnp.where(new, key, rows.key),
    done=rows.done & ~new,
    tokens=jnp.where(new[:, None], -1, rows.tokens),
    caches=caches,
  )
  return _draw(rows, questions.logits[which], temperature, new)


@functools.partial(
  jax.jit, static_argnames=('cfg', 'temperature', 'eos_ids', 'limit'), donate_argnames='rows'
)
def _write(
  weights: cached_model.Weights,
  rows: _Rows,
  steps: Array,
  *,
  cfg: schema.ModelConfig,
  temperature: float,
  eos_ids: tuple[int, ...],
  limit: int,
) -> _Rows:
  """Decodes `steps` tokens of every row, or until all rows have ended; `limit` per answer."""

  def ended(rows: _Rows) -> _Rows:
    return rows._replace(
      done=rows.done | sampling.ends(rows.token, eos_ids) | (rows.count >= limit)
    )

  def step(carry: tuple[Array, _Rows]) -> tuple[Array, _Rows]:
    number, rows = carry
    active = ~rows.done
    out = cached_model.step(
      cfg,
      weights,
      rows.token[:, None],
      rows.position[:, None],
      rows.caches,
      keep_experts=cfg.is_moe,
    )
    logits = cached_model.logits_of(cfg, weights, out.hidden)[:, 0]
    experts = rows.experts
    if experts is not None:
      assert out.experts is not None
      at = jnp.where(active, rows.count - 1, experts.shape[2])  # out of bounds, so dropped
      experts = experts.at[:, jnp.arange(len(at)), at].set(out.experts[:, :, 0], mode='drop')
    rows = rows._replace(experts=experts, caches=out.caches, position=rows.position + active)
    return number + 1, ended(_draw(rows, logits, temperature, active))

  def goes_on(carry: tuple[Array, _Rows]) -> Array:
    number, rows = carry
    return (number < steps) & ~rows.done.all()

  return jax.lax.while_loop(goes_on, step, (jnp.int32(0), ended(rows)))[1]


class Sampler:
  """Writes groups of answers with the weights of the moment; compiles once per shape."""

  def __init__(self, cfg: schema.Config, eos_ids: Sequence[int], mesh: jax.sharding.Mesh):
    """Holds what does not change.

    Args:
      cfg: the run, whose `objective.policy` says how answers are written.
      eos_ids: ids that end an answer.
      mesh: the devices, which share the rows.
    """
    self._cfg, self._policy = cfg.model, cfg.objective.policy
    self._eos_ids, self._mesh = tuple(eos_ids), mesh
    self._seed = cfg.train.seed

  def sample(
    self,
    variables: trees.Variables,
    prompts: Sequence[Sequence[int]],
    draw: int,
    *,
    greedy: bool = False,
    on_answer: Callable[[int, Answer], None] | None = None,
  ) -> Rollouts:
    """`group_size` answers to every question, or the likeliest one.

    The weights are laid out for decoding first, a copy of the model that goes again.

    Args:
      variables: params and router_state, on the mesh.
      prompts: ids of P questions, begin-of-document token included.
      draw: number of this batch of questions in the run, which decides the draws with its seed.
      greedy: one answer to each, of the likeliest tokens.
      on_answer: told (its number among the answers, the answer) of each that has ended, while the
        devices write on; in the order in which they end.

    Raises:
      errors.InputError: a question is empty, or does not fit the context with its answer.
    """
    start = time.perf_counter()
    policy, ways = self._policy, partitioning.row_ways(self._mesh)
    tokens, length = generate.padded(self._cfg, prompts, policy.max_new_tokens)
    fill = -len(prompts) % ways
    tokens, length = (
      np.pad(tokens, ((0, fill), (0, 0))),
      np.pad(length, (0, fill), constant_values=1),
    )
    num_slots = generate.in_buckets(tokens.shape[1] + policy.max_new_tokens)
    with partitioning.activate(self._mesh):
      weights = cached_model.unstack(self._cfg, variables)
      put = partitioning.put_global_batch({'tokens': tokens, 'length': length}, self._mesh)
      questions = _read(weights, put['tokens'], put['length'], cfg=self._cfg, num_slots=num_slots)
      answers = self._answers(weights, questions, prompts, draw, greedy, on_answer)
    return Rollouts(answers, time.perf_counter() - start)

  def _answers(
    self,
    weights: cached_model.Weights,
    questions: _Questions,
    prompts: Sequence[Sequence[int]],
    draw: int,
    greedy: bool,
    on_answer: Callable[[int, Answer], None] | None,
  ) -> list[Answer]:
    policy, ways = self._policy, partitioning.row_ways(self._mesh)
    size, temperature = (1, 0.0) if greedy else (policy.group_size, policy.temperature)
    total = len(prompts) * size
    num_rows = -(-min(policy.rows or total, total) // ways) * ways
    rows = _empty(questions, num_rows, policy.max_new_tokens)
    waiting = list(range(total))
    owner: list[int | None] = [None] * num_rows
    found: dict[int, Answer] = {}
    told = 0
    prompt_experts = agreement.fetch(questions.experts)
    while len(found) < total:
      question, key = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.uint32)
      for row in range(num_rows):
        if owner[row] is None and waiting:
          number = owner[row] = waiting.pop(0)
          question[row] = number // size
          key[row] = _key(self._seed, draw, number)
      if (question >= 0).any():
        given = partitioning.put_global_batch({'question': question, 'key': key}, self._mesh)
        rows = _hand_out(rows, questions, given['question'], given['key'], temperature=temperature)
      # With nothing to hand out or to tell no row needs a look before all have ended.
      steps = PIECE if waiting or on_answer else policy.max_new_tokens
      rows = _write(
        weights,
        rows,
        np.int32(steps),
        cfg=self._cfg,
        temperature=temperature,
        eos_ids=self._eos_ids,
        limit=policy.max_new_tokens,
      )
      told = _tell(found, told, on_answer)  # the devices are writing
      done = agreement.fetch(rows.done)
      ready = [row for row in range(num_rows) if done[row] and owner[row] is not None]
      if not ready:
        continue
      written = agreement.fetch((rows.tokens, rows.scores, rows.experts))
      for row in ready:
        number = owner[row]
        assert number is not None
        question_number = number // size
        found[number] = _answer(
          question_number,
          list(prompts[question_number]),
          row,
          written,
          prompt_experts,
          self._eos_ids,
        )
        owner[row] = None
    _tell(found, told, on_answer)
    return [found[number] for number in range(total)]


def _tell(
  found: dict[int, Answer], told: int, on_answer: Callable[[int, Answer], None] | None
) -> int:
  """Tells of all answers but the first `told`, in the order found; returns how many there are."""
  if on_answer is not None:
    for number in list(found)[told:]:
      on_answer(number, found[number])
  return len(found)


def _key(seed: int, draw: int, number: int) -> int:
  """What decides the draws of an answer, 32 bits."""
  mixed = np.random.SeedSequence([seed, draw, number]).generate_state(1, np.uint32)
  return int(mixed[0])


def _empty(questions: _Questions, num_rows: int, num_new: int) -> _Rows:
  """Rows without an answer, laid out as the questions are."""

  @jax.jit
  def make(questions: _Questions) -> _Rows:
    def zeros(a: Array) -> Array:
      return jnp.zeros((num_rows, *a.shape[1:]), a.dtype)

    experts, row = questions.experts, jnp.zeros(num_rows, jnp.int32)
    if experts is not None:
      experts = jnp.zeros((len(experts), num_rows, num_new, experts.shape[3]), experts.dtype)
    return _Rows(
      token=row,
      position=row,
      count=row,
      key=row.astype(jnp.uint32),
      done=row == 0,
      tokens=jnp.full((num_rows, num_new), -1, jnp.int32),
      scores=jnp.zeros((num_rows, num_new, 3)),
      experts=experts,
      caches=jax.tree.map(zeros, questions.caches),
    )

  return make(questions)


def _answer(
  question: int,
  prompt: list[int],
  row: int,
  written: Any,
  prompt_experts: np.ndarray | None,
  eos_ids: Sequence[int],
) -> Answer:
  tokens, scores, experts = written
  count = int((tokens[row] >= 0).sum())
  ids = [int(i) for i in tokens[row, :count]]
  routes = None
  if prompt_experts is not None:
    read = (prompt_experts[:, question, : len(prompt)], experts[:, row, : count - 1])
    routes = np.concatenate(read, axis=1)
  log_probs, of_model, entropy = scores[row, :count].T
  return Answer(question, prompt, ids, ids[-1] in eos_ids, log_probs, of_model, entropy, routes)
