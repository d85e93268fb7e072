"""The stage of a run that learns from rewards: answers are written, judged, and learned from.

An iteration writes `group_size` answers to each of `prompts` questions with the weights of the
moment, has them judged in processes beside, and takes `updates` optimizer steps on them. A run
stops, saves and goes on between iterations only, so that answers need not be kept: they are written
again, the same ones, from the weights of the checkpoint.

Which questions an iteration asks is a pure function of (seed, iteration): the questions of the
training split, in an order of its own for every pass over them.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import atomic_files, errors, trees
from moe_jax.balance import router_stats
from moe_jax.config import schema
from moe_jax.data import chat_formats
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.inference import generate
from moe_jax.models import transformer
from moe_jax.post_training import answers as answers_lib
from moe_jax.post_training import (
  policy_batches,
  rollouts,
  step_labels,
  step_scores,
  value_targets,
  verification,
)
from moe_jax.processes import agreement
from moe_jax.rewards import pool as pool_lib
from moe_jax.rewards import registry, reward
from moe_jax.runs import policy_plot, trained_run
from moe_jax.training import (
  loop,
  objective,
  optimizer_step,
  policy_loss,
  train_state,
  value_head,
)

WORKERS = 2  # processes that judge answers
MOST_QUESTIONS = 10**6  # of a source that are held in memory
PART = 4096  # questions that are tokenised together
EQUAL_ITERATIONS = 5  # in a row that teach nothing, until that is said


class _Measured(NamedTuple):
  """What some weights say of a batch."""

  log_probs: Any  # [B, L] float32, of the targets, as a training step has them
  experts: Any  # [B, L, MoE layers, K] int32; None for a dense model
  values: Any  # [B, L] float32; None without a value head


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(
  model: schema.ModelConfig,
  temperature: float,
  chunk: int,
  variables: trees.Variables,
  batch: Mapping[str, jax.Array],
  value: trees.Params | None,
) -> _Measured:
  """What the weights, with a value head or none, say of a batch."""
  inputs = (batch[key] for key in ('tokens', 'positions', 'segment_ids'))
  sown: Any = transformer.Transformer(model, train=True).apply(
    variables, *inputs, experts=objective.recorded_experts(batch), mutable=['intermediates']
  )
  out, kept = sown
  head, targets = transformer.head_of(model, variables['params']), batch['targets']
  log_probs = objective.policy_log_probs(
    out.normed, head, targets, temperature=temperature, chunk=chunk
  )
  values = None if value is None else value_head.values(value, out.normed)
  if not model.is_moe:
    return _Measured(log_probs, None, values)
  experts = kept['intermediates']['moe_layers']['moe']['expert_idx'][0]
  return _Measured(log_probs, jnp.moveaxis(experts, 0, 2), values)


class PolicyStage:
  """What a training loop asks: batches, what is logged, and when it may stop."""

  def __init__(self, cfg: schema.Config):
    """Reads the questions.

    Raises:
      errors.InputError: the reward is unknown or not read, or there are too few questions.
    """
    policy = cfg.objective.policy
    terms = registry.parse(policy.reward)
    registry.check(policy.reward)
    self._cfg, self._policy = cfg, policy
    field = 'config.objective.policy.reward_model'
    self._judge = trained_run.load(policy.reward_model, flag=field) if policy.reward_model else None
    in_steps = terms[0].name in registry.IN_STEPS
    if self._judge is not None:
      step_scores.check(self._judge.cfg, field)
      in_steps = not self._judge.cfg.objective.process_reward.outcome
    errors.require(
      policy.supervision == 'outcome' or in_steps,
      f'config.objective.policy.reward={policy.reward!r} must begin with a reward of steps '
      f'({", ".join(registry.IN_STEPS)}), or reward_model={policy.reward_model!r} be a judge of '
      "steps, for supervision='process'",
    )
    errors.require(
      policy.supervision == 'outcome' or self._judge is not None or len(terms) == 1,
      f'config.objective.policy.reward={policy.reward!r} must be one reward with '
      "supervision='process', which reads the rewards of steps alone, and so nothing but the first "
      f"term; leave the others out, or take supervision='outcome'",
    )
    self._questions = answers_lib.questions(cfg.data, MOST_QUESTIONS, heldout=False)
    errors.require(
      len(self._questions) >= policy.prompts,
      f'config.data.path={cfg.data.path!r} has {len(self._questions)} questions to be trained on, '
      f'and config.objective.policy.prompts={policy.prompts} asks for more at once; ask fewer',
    )
    self._heldout = []
    if policy.eval_questions:
      self._heldout = answers_lib.questions(cfg.data, policy.eval_questions)
    self.figures: dict[str, float | None] = dict.fromkeys(policy_loss.ROLLOUT_FIGURES)
    if value_head.is_used(cfg):
      self.figures |= dict.fromkeys(policy_loss.PPO_ROLLOUT_FIGURES)
    self._state: train_state.TrainState | None = None
    self._step, self._waited, self._told_unread, self._equal = 0, 0.0, False, 0

  def batches(
    self,
    state: train_state.TrainState,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizer_lib.Tokenizer,
    workdir: pathlib.Path,
    say: Callable[[str], None],
  ) -> Generator[trees.HostBatch, None, None]:
    """Yields the batch of every step from `state` on; each iteration's is yielded `updates` times.

    Args:
      state: that the run begins or goes on with.
      mesh: devices of all processes.
      tokenizer: of the run.
      workdir: of the run.
      say: prints one line.

    Raises:
      errors.InputError: too few questions fit `model.max_seq_len` with their answers, or a held-out
        one does not.
      pool.PoolError: no reward can be given.
    """
    cfg, policy = self._cfg, self._policy
    self._state, self._step = state, int(state.step)
    self._mesh, self._tokenizer, self._workdir, self._say = mesh, tokenizer, workdir, say
    self._sampler = rollouts.Sampler(cfg, tokenizer.end_ids, mesh)
    self._leave_long_out()
    with pool_lib.RewardPool(policy.reward, WORKERS, policy.reward_seconds) as self._pool:
      if self._pool.isolation:
        say(f'programs run in: {self._pool.isolation}')
      if self._step == 0:
        self._ask_heldout()
      while self._step < cfg.train.num_steps:
        batch = self._iteration(self._step // policy.updates)
        for _ in range(policy.updates):
          yield batch
        if cfg.train.eval_every and self._step % cfg.train.eval_every < policy.updates:
          self._ask_heldout()

  def _leave_long_out(self):
    """Leaves questions out that have no room for an answer: a run would end where one is asked."""
    cfg, every = self._cfg, self._questions
    room = cfg.model.max_seq_len - self._policy.max_new_tokens
    parts = [every[i : i + PART] for i in range(0, len(every), PART)]
    sizes = [len(prompt) for part in parts for prompt in self._prompts(part)]
    self._questions = [one for one, size in zip(every, sizes, strict=True) if size <= room]
    out, prompts = len(every) - len(self._questions), self._policy.prompts
    errors.require(
      len(self._questions) >= prompts,
      f'config.model.max_seq_len={cfg.model.max_seq_len} has no room for {out} of {len(every)} '
      f'questions with max_new_tokens={self._policy.max_new_tokens} behind them, and '
      f'config.objective.policy.prompts={prompts} asks for more than are left; make rows longer, '
      'or answers shorter',
    )
    if out:
      self._say(
        f'{out} of {len(every)} questions are left out: with max_new_tokens behind them they are '
        'longer than a row'
      )

  def after_step(self, report: loop.StepReport):
    """Holds the state of the moment, which the next iteration samples from."""
    self._state, self._step = report.state, report.step
    if report.complete:
      self._ask_heldout()

  def may_stop(self) -> bool:
    """Whether the run may stop and be saved here: at the end of an iteration."""
    return (self._step + 1) % self._policy.updates == 0

  def scalars(self, metrics: optimizer_step.StepMetrics) -> dict[str, float | None]:
    """What is logged of a step, that of its iteration included."""
    return {**optimizer_step.host_metrics(metrics), **self.figures}

  def _variables(self) -> dict[str, Any]:
    assert self._state is not None
    return self._state.variables

  def _iteration(self, iteration: int) -> trees.HostBatch:
    """Writes, judges and lays out the answers of an iteration."""
    policy, start = self._policy, time.perf_counter()
    variables = self._variables()
    everything: list[list[policy_batches.Judged]] = []
    kept: list[list[policy_batches.Judged]] = []
    tokens, seconds, self._waited = 0, 0.0, 0.0
    for number in range(policy.max_draws):
      draw = iteration * policy.max_draws + number
      groups, written = self._groups(variables, draw)
      everything += groups
      tokens, seconds = tokens + written.num_tokens, seconds + written.seconds
      useful = [group for group in groups if policy_batches.is_mixed(group)]
      kept += groups if policy.max_draws == 1 else useful
      if len(kept) >= policy.prompts:
        break
    kept = kept[: policy.prompts] or everything[: policy.prompts]
    flat = [one for group in kept for one in group]
    batch, where = self._learnable(variables, flat)
    self.figures |= policy_batches.answer_figures(everything)
    self._tell_equal()
    self.figures |= {
      'sampler_max_vio': _max_vio(self._cfg, flat),
      'rollout_seconds': time.perf_counter() - start,
      'rollout_tokens_per_second': tokens / seconds,
      'reward_wait_share': self._waited / (seconds + self._waited),
    }
    return batch

  def _groups(
    self, variables: trees.Variables, draw: int
  ) -> tuple[list[list[policy_batches.Judged]], rollouts.Rollouts]:
    """Groups of answers to one batch of questions, judged."""
    policy, questions = self._policy, self._asked(draw)
    prompts = self._prompts(questions)
    said: dict[int, tuple[str, int]] = {}
    submitted: dict[int, pool_lib.Scored] = {}

    def judge(number: int, answer: rollouts.Answer):
      said[number] = self._text(answer)
      items = self._items([answer], [questions[answer.question]], [said[number]])
      submitted[number] = self._pool.submit(items)

    # Answers are judged while others are written still.
    written = self._sampler.sample(variables, prompts, draw, on_answer=judge)
    owners = [questions[one.question] for one in written.answers]
    numbers = range(len(written.answers))
    texts = [said[i] for i in numbers]
    begin = time.perf_counter()
    found = pool_lib.joined([submitted[i] for i in numbers]).result()
    self._waited += time.perf_counter() - begin
    if self._judge is not None:
      plain = [text for text, _ in texts]
      found = judged_by(self._judge, found, owners, plain, self._tell_unread)
    found = [
      value_targets.of_what_came(policy, one, text, worth)
      for one, (text, _), worth in zip(written.answers, texts, found, strict=True)
    ]

    def ends(number: int) -> list[int]:
      one, skipped = written.answers[number], texts[number][1]
      offsets = [offset for offset, _ in found[number].step_rewards or ()]
      decode = self._tokenizer.decode
      return policy_batches.step_ends(decode, one.tokens, offsets, skipped, one.ended)

    return policy_batches.judged(policy, written.answers, found, ends), written

  def _tell_equal(self):
    """Says that iteration after iteration teaches nothing; a value head may learn all the same."""
    equal = self.figures['equal_groups'] == 1 and self._policy.algorithm != 'ppo'
    self._equal = self._equal + 1 if equal else 0
    if self._equal == EQUAL_ITERATIONS:
      self._say(
        f'warning: {EQUAL_ITERATIONS} iterations in a row the answers to each question were worth '
        'the same, which teaches nothing: start from a run that is right now and then '
        '(python -m experiments.answers says how often), ask easier questions, or raise '
        'config.objective.policy.group_size or max_draws; this is said once for as long as it lasts'
      )

  def _tell_unread(self, number: int):
    if not self._told_unread:
      self._say(
        f'no room in a row of the judge (model.max_seq_len of {self._policy.reward_model}) for '
        f'{number} steps of this iteration: they are worth {step_scores.UNREAD:g}, as others '
        'will be; this is said once'
      )
    self._told_unread = True

  def _asked(self, draw: int) -> list[answers_lib.Question]:
    """The questions of a batch: a pass over all of them in an order of its own, then the next."""
    total, size = len(self._questions), self._policy.prompts
    per_pass = total // size
    passes, place = divmod(draw, per_pass)
    order = np.random.default_rng([self._cfg.train.seed, passes]).permutation(total)
    return [self._questions[i] for i in order[place * size : (place + 1) * size]]

  def _prompts(self, questions: Sequence[answers_lib.Question]) -> list[list[int]]:
    return chat_formats.prompts(self._cfg.data, [q.prompt for q in questions], self._tokenizer)

  def _text(self, answer: rollouts.Answer) -> tuple[str, int]:
    """(what an answer says, characters before that in the text of its tokens alone)."""
    ids, decode = answer.tokens[:-1] if answer.ended else answer.tokens, self._tokenizer.decode
    said = chat_formats.said(self._cfg.data, generate.continuation(decode, answer.prompt, ids))
    return said, len(decode(ids)) - len(said)

  def _items(
    self,
    written: Sequence[rollouts.Answer],
    owners: Sequence[answers_lib.Question],
    texts: Sequence[tuple[str, int]],
  ) -> list[reward.Item]:
    return [
      reward.Item(
        question.prompt[-1].content,
        answer.tokens[:-1] if answer.ended else answer.tokens,
        text,
        answers_lib.example(self._cfg.data, question),
      )
      for answer, question, (text, _) in zip(written, owners, texts)
    ]

  def _learnable(
    self, variables: trees.Variables, answers: Sequence[policy_batches.Judged]
  ) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
    """The batch of an iteration with the log-probabilities that its steps are measured against."""
    cfg, policy = self._cfg, self._policy
    # Others than those to be replayed may be no K per token: a router that is not ranked has all.
    replays = cfg.model.is_moe and policy.replay == 'rollout'
    layers = cfg.model.num_moe_layers if replays else 0
    batch, where = policy_batches.rows(cfg, answers, layers)
    replayed = batch.pop(policy_loss.EXPERTS, None)
    assert self._state is not None
    value = self._state.params.get(value_head.KEY)
    old = free = self._measured(variables, batch, value)
    if policy.replay == 'update':
      replayed = free.experts
    if policy.replay != 'none' and replayed is not None:
      batch[policy_loss.EXPERTS] = replayed
      if policy.replay == 'rollout':
        self._add_last_experts(answers, where, replayed, free.experts)
        old = self._measured(variables, batch, value)
    batch[policy_loss.OLD] = old.log_probs
    self.figures |= policy_batches.sampler_figures(
      policy, answers, where, free.log_probs, free.experts
    )
    if policy.kl_weight:
      assert self._state.reference is not None
      reference = self._state.replace(params=self._state.reference).variables
      batch[policy_loss.REFERENCE] = self._measured(reference, batch).log_probs
    if value is not None:
      rewards = [errors.present(one.rewards, 'PPO has rewards of tokens') for one in answers]
      plain = [one.answer for one in answers]
      self.figures |= value_targets.fill(policy, batch, plain, rewards, where, old.values)
    return batch, where

  def _add_last_experts(
    self,
    answers: Sequence[policy_batches.Judged],
    where: Sequence[tuple[int, int]],
    replayed: np.ndarray,
    own: np.ndarray,
  ):
    """The sampler has not read the last token of an answer; where its value is asked, own ones."""
    for one, (row, at) in zip(answers, where):
      if value_targets.goes_on(self._policy, one.answer):
        last = rollouts.places_of(one.answer, at).stop
        replayed[row, last] = own[row, last]

  def _measured(
    self,
    variables: trees.Variables,
    batch: Mapping[str, np.ndarray],
    value: trees.Params | None = None,
  ) -> _Measured:
    """What weights say of a batch, some rows at a time."""
    cfg = self._cfg
    size = cfg.train.micro_batch_size or cfg.train.batch_size
    keys = ('tokens', 'targets', 'positions', 'segment_ids', policy_loss.EXPERTS)
    found = []
    for begin in range(0, len(batch['tokens']), size):
      part = {key: batch[key][begin : begin + size] for key in keys if key in batch}
      with partitioning.activate(self._mesh):
        put = partitioning.put_global_batch(part, self._mesh)
        scores = _scores(
          cfg.model, self._policy.temperature, cfg.train.loss_chunk, variables, put, value
        )
        found.append(agreement.fetch(scores))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

  def _ask_heldout(self):
    """Asks the held-out questions, says how many are right and keeps that."""
    if not self._heldout:
      return
    prompts = self._prompts(self._heldout)
    written = self._sampler.sample(self._variables(), prompts, 0, greedy=True).answers
    texts = [self._text(one) for one in written]
    found = self._pool.score(self._items(written, self._heldout, texts))
    right, total = sum(one.kind == 'right' for one in found), len(found)
    if not agreement.is_first():
      return
    low, high = answers_lib.wilson(right, total)
    self._say(
      f'step={self._step} held-out questions: {right} of {total} right {right / total:.1%} '
      f'[{low:.1%}, {high:.1%}]'
    )
    path = self._workdir / policy_plot.HELDOUT_FILE
    lines = [one for one in policy_plot.read_heldout(self._workdir) if one['step'] < self._step]
    lines.append({'step': self._step, 'right': right, 'total': total})
    atomic_files.write_text(path, ''.join(json.dumps(one) + '\n' for one in lines))


def judged_by(
  judge: trained_run.Run,
  found: Sequence[reward.Reward],
  questions: Sequence[answers_lib.Question],
  texts: Sequence[str],
  tell_unread: Callable[[int], object] = lambda number: None,
) -> list[reward.Reward]:
  """Rewards whose values are a model's; whether the answer is right stays what the checker says.

  A judge of steps gives every step its score, and the answer the least of them; one of whole
  solutions gives the answer its score. A step that a row of the judge has no room for is worth 0,
  and so is an answer without a step: this is one behind its end, at the token that ends it, or
  saying nothing would be worth more than steps below the mean.

  Args:
    judge: a run of objective.kind='process_reward'.
    found: rewards of a checker.
    questions: of each answer.
    texts: the answers.
    tell_unread: see `step_scores.score`.
  """
  ends = [step_labels.ends_of_steps(text) for text in texts]
  solutions = [
    step_scores.Solution(question.prompt[-1].content, text, own)
    for question, text, own in zip(questions, texts, ends, strict=True)
  ]
  scores = step_scores.score(judge, solutions, tell_unread=tell_unread)
  whole = judge.cfg.objective.process_reward.outcome
  new = []
  for one, text, own, score in zip(found, texts, ends, scores, strict=True):
    value = verification.aggregate(score.tolist(), 'min')
    steps = None if whole else [(end, float(s)) for end, s in zip(own, score, strict=True)]
    if steps == []:
      steps = [(len(text) + 1, value)]
    new.append(one._replace(value=value, step_rewards=steps))
  return new


def _max_vio(cfg: schema.Config, answers: Sequence[policy_batches.Judged]) -> float | None:
  """MaxVio of what the sampler has chosen, mean over the layers; None for a dense model."""
  routes: Iterator[np.ndarray] = (
    one.answer.experts for one in answers if one.answer.experts is not None
  )
  loads: Any = 0
  for experts in routes:
    counts = [np.bincount(layer.ravel(), minlength=cfg.model.moe.num_experts) for layer in experts]
    loads = loads + np.array(counts)
  if np.ndim(loads) == 0:
    return None
  return float(router_stats.max_vio(loads[:, : cfg.model.moe.num_experts].astype(float)).mean())
