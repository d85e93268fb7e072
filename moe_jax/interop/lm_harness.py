"""Our models in EleutherAI's lm-evaluation-harness (package lm-eval, extra `hf`).

The harness owns tasks, prompts and metrics; this module answers its three kinds of requests. Every
text is read as a document of its own that begins with the begin-of-document token, as in training.
Imported only where tasks are asked for, because it needs the extra.
"""

import functools
import pathlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

# Of the extra `hf`, which a type check may lack.
from lm_eval import evaluator, tasks  # pyright: ignore[reportMissingImports]
from lm_eval import utils as harness_utils  # pyright: ignore[reportMissingImports]
from lm_eval.api import model as harness_model  # pyright: ignore[reportMissingImports]

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.inference import generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import transformer
from moe_jax.runs import trained_run

Array = jax.Array

_DEFAULT_NEW_TOKENS = 256  # the harness's own default where a task names none


def evaluate_tasks(
  run: trained_run.Run,
  names: Sequence[str],
  *,
  include_path: str = '',
  num_fewshot: int | None = None,
  limit: int | None = None,
  batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
  """Runs tasks of the harness.

  Args:
    run: the model.
    names: tasks.
    include_path: directory of further task files (YAML).
    num_fewshot: examples in front of each question; None is the task's own number.
    limit: first so many documents of each task; None is all.
    batch_size: rows of a forward pass.

  Returns:
    {task: {'metric,filter': value}}, as the harness reports them.

  Raises:
    errors.InputError: an unknown task, a bad size, or a data set that cannot be reached.
  """
  for name, value in (('batch_size', batch_size), ('limit', limit)):
    errors.require(value is None or value >= 1, f'--{name}={value} must be at least 1')
  errors.require(
    not include_path or pathlib.Path(include_path).is_dir(),
    f'--include_path={include_path} is no directory; give the one that holds the task files',
  )
  generate.check_router(run.cfg.model)
  manager = tasks.TaskManager(include_path=include_path or None)
  unknown = [name for name in names if not manager.match_tasks([name])]
  errors.require(
    not unknown,
    f'--tasks={",".join(unknown)} is not known to lm-eval; `lm-eval ls tasks` lists its tasks, and '
    '--include_path=DIR adds your own',
  )
  try:
    results = evaluator.simple_evaluate(
      model=Harness(run, batch_size),
      tasks=list(names),
      task_manager=manager,
      num_fewshot=num_fewshot,
      limit=limit,
      bootstrap_iters=1000,
      log_samples=False,
      verbosity='ERROR',
    )
  except Exception as e:
    if not _comes_from_loading_data(e):
      raise
    raise errors.InputError(
      f'--tasks={",".join(names)}: a data set cannot be read ({" ".join(str(e).split())}); give '
      'the command once where there is a network, bring the folder HF_HOME (~/.cache/huggingface) '
      'from there, and set HF_HUB_OFFLINE=1'
    ) from e
  return {task: dict(values) for task, values in results['results'].items()}


def _comes_from_loading_data(error: BaseException) -> bool:
  """Whether an exception passed through the library `datasets`, or is one of no connection."""
  modules = (
    frame.f_globals.get('__name__', '') for frame, _ in traceback.walk_tb(error.__traceback__)
  )
  libraries = ('datasets', 'huggingface_hub')
  return isinstance(error, ConnectionError) or any(
    name.partition('.')[0] in libraries for name in modules
  )


@functools.partial(jax.jit, static_argnums=0)
def _continuation(
  cfg: schema.ModelConfig, variables: trees.Variables, ids: Array, length: Array, start: Array
) -> tuple[Array, Array]:
  """Log-likelihood of ids[start:length] after ids[:start], and whether each is the most likely.

  Args:
    cfg: the model.
    variables: params and router_state.
    ids: [B, L] int32, padded on the right.
    length: [B] int32.
    start: [B] int32, at least 1.

  Returns:
    ([B] float32 nats, [B] bool).
  """
  at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  real = (at < length[:, None]).astype(jnp.int32)
  logits = transformer.apply(cfg, variables, ids, at, real).logits[:, :-1]
  aims, place = ids[:, 1:], at[:, 1:]
  scored = (place >= start[:, None]) & (place < length[:, None])
  label = jnp.take_along_axis(logits, aims[..., None], axis=-1)[..., 0]
  logp = label - jax.nn.logsumexp(logits, axis=-1)
  greedy = logits.argmax(axis=-1) == aims
  return jnp.where(scored, logp, 0.0).sum(axis=1), (greedy | ~scored).all(axis=1)


class Harness(harness_model.TemplateLM):
  """A loaded run as a language model of the harness."""

  def __init__(self, run: trained_run.Run, batch_size: int):
    super().__init__()
    self._run, self._rows = run, batch_size
    self._ways = partitioning.row_ways(run.mesh)

  @functools.cached_property
  def _generator(self) -> generate.Generator:
    return generate.Generator(self._run.cfg.model, self._run.variables, self._run.tokenizer.end_ids)

  @property
  def eot_token_id(self) -> int:
    """End of document."""
    return self._run.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What an empty context is replaced with: begin of document."""
    return self._run.tokenizer.bos_id

  @property
  def max_length(self) -> int:
    """Tokens of the longest text, begin of document included."""
    return self._run.cfg.model.max_seq_len

  @property
  def tokenizer_name(self) -> str:
    """Names the tokenizer in the harness's caches."""
    return trained_run.digest(self._run.tokenizer)

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **unused: Any
  ) -> list[int]:
    """Ids of a text without special tokens; those are added where a row is made."""
    return self._run.tokenizer.encode(string)

  def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of whole texts, in disjoint windows of the model's length."""
    rows, owner = [], []
    for i, request in enumerate(requests):
      windows = harness_utils.get_rolling_token_windows(
        self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length - 1,
        context_len=1,
      )
      for pair in map(harness_utils.make_disjoint_window, windows):
        rows.append((('', ''), *pair))
        owner.append(i)
    scores = self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)
    totals = [0.0] * len(requests)
    for i, (score, _) in zip(owner, scores):
      totals[i] += score
    return totals

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
    disable_tqdm: bool = False,
    **unused: Any,
  ) -> list[tuple[float, bool]]:
    """(nats, greedy) of each continuation; contexts that do not fit lose their beginning."""
    rows = [self._row(context, target) for _, context, target in requests]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    with tqdm.tqdm(total=len(rows), desc='likelihoods', disable=disable_tqdm or None) as bar:
      for part in _batches(order, self._batch_size()):
        for i, score in zip(part, self._scores([rows[i] for i in part])):
          scores[i] = score
        bar.update(len(part))
    return scores

  def _batch_size(self) -> int:
    return -(-self._rows // self._ways) * self._ways

  def _row(self, context: list[int], target: list[int]) -> tuple[list[int], int]:
    """(ids with the begin token, place of the first target)."""
    bos = self.prefix_token_id
    context = context[1:] if context[:1] == [bos] else context
    errors.require(
      len(target) < self.max_length,
      f'config.model.max_seq_len={self.max_length} is too short for a continuation of {len(target)}'
      ' tokens that a task asks about; leave the task out, or use a model of a longer context',
    )
    room = self.max_length - 1 - len(target)
    kept = context[len(context) - min(room, len(context)) :]
    return [bos, *kept, *target], 1 + len(kept)

  def _scores(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in rows)
    bucket = generate.LENGTH_BUCKET
    width = min(-(-longest // bucket) * bucket, self.max_length)
    # The last batch is filled up, so that one program serves all batches of a width.
    full = [*rows, *([([self.prefix_token_id], 1)] * (self._batch_size() - len(rows)))]
    ids = np.zeros((len(full), width), np.int32)
    for line, (row, _) in zip(ids, full):
      line[: len(row)] = row
    batch = {
      'ids': ids,
      'length': np.array([len(row) for row, _ in full], np.int32),
      'start': np.array([start for _, start in full], np.int32),
    }
    with partitioning.activate(self._run.mesh):
      put = partitioning.put_global_batch(batch, self._run.mesh)
      score, greedy = _continuation(self._run.cfg.model, self._run.variables, **put)
    return zip(map(float, np.asarray(score)[: len(rows)]), map(bool, np.asarray(greedy)))

  def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
    """Continuations up to a task's stop strings."""
    found = [''] * len(requests)
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
    with tqdm.tqdm(total=len(requests), desc='continuations', disable=disable_tqdm or None) as bar:
      for members in groups.values():
        for part in _batches(members, self._rows):
          texts = self._continue([requests[i].args[0] for i in part], requests[part[0]].args[1])
          for i, text in zip(part, texts):
            found[i] = text
          bar.update(len(part))
    return found

  def _continue(self, contexts: Sequence[str], kwargs: Mapping[str, Any]) -> list[str]:
    """Continues a few texts under one set of the harness's generation arguments."""
    until = kwargs.get('until') or []
    stop = [until] if isinstance(until, str) else list(until)
    new_tokens = int(kwargs.get('max_gen_toks', _DEFAULT_NEW_TOKENS))
    new_tokens = max(1, min(new_tokens, self.max_length // 2))
    sampling = sampling_lib.Sampling(
      temperature=float(kwargs.get('temperature', 0.0)) if kwargs.get('do_sample') else 0.0,
      top_p=float(kwargs.get('top_p', 1.0)),
      top_k=int(kwargs.get('top_k', 0)),
    )
    room = self.max_length - new_tokens - 1
    prompts = [[self.prefix_token_id, *self.tok_encode(text)[-room:]] for text in contexts]
    generated = self._generator.generate(
      prompts,
      new_tokens,
      sampling,
      decode_text=self._run.tokenizer.decode,
      stop=[text for text in stop if text],
    )
    return generated.texts


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
  for i in range(0, len(items), size):
    yield items[i : i + size]
