"""Writes, reads and judges texts of every arm and seed, and the study's report."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import cli, local_jobs, readme_tables, study_record
from experiments.watermark import arms as arms_lib
from experiments.watermark import report
from moe_jax import atomic_files, errors
from moe_jax.api import load
from moe_jax.api import run as run_lib
from moe_jax.inference import processors, sampling
from moe_jax.runs import trained_run
from moe_jax.watermark import attacks, decode, encode, key_file, partition, proxy

Ids = list[int]


class Models(NamedTuple):
  """The three runs, and the text that prompts come from."""

  writer: run_lib.Run
  judge: run_lib.Run
  small: run_lib.Run  # the proxy's
  known: proxy.Proxy
  prompts: Mapping[str, np.ndarray]  # training tokens by domain
  unmarked: np.ndarray  # held-out tokens of code


def main(unused_argv: Sequence[str]):
  """Runs what is not there yet, then writes the report."""
  values = flags.FLAGS
  workdir = pathlib.Path(cli.required('workdir'))
  seeds = local_jobs.seeds(values.seeds)
  errors.require(values.prompts >= 2, f'--prompts={values.prompts} must be at least 2')
  errors.require(
    values.windows >= len(seeds),
    f'--windows={values.windows} must be at least 1 for each of {len(seeds)} seeds; raise it, or '
    'lower --seeds',
  )
  out = pathlib.Path(values.out or pathlib.Path(__file__).parent)
  readme_tables.check(out, report.START, report.END)
  models = _load()
  _check_heldout(len(models.unmarked), values.windows // len(seeds))
  settings = {
    'prompts': values.prompts,
    'windows': values.windows,
    'arms': [list(arm) for arm in arms_lib.ARMS],
    'runs': [key_file.digest(run.variables)[:12] for run in (models.writer, models.judge)],
    'proxy': key_file.digest(models.small.variables)[:12],
  }
  results = {}
  for seed in seeds:
    parts = {'texts': _texts, 'attacks': _attacks, 'windows': _windows}
    results[seed] = {
      name: _kept(workdir / str(seed) / f'{name}.json', settings, work, models, seed)
      for name, work in parts.items()
    }
  times = _kept(workdir / 'times.json', settings, _times, models, seeds[0])
  report.write(out, settings, results, times)


def _load() -> Models:
  writer, judge, small = (
    load.load(cli.required(name), flag=f'--{name}') for name in ('writer', 'judge', 'proxy')
  )
  digests = {trained_run.digest(run.tokenizer) for run in (writer, judge, small)}
  errors.require(
    len(digests) == 1,
    '--writer, --judge and --proxy must have one tokenizer; see configs/watermark',
  )
  corpus = writer.heldout_corpus()
  errors.require(
    corpus.domains == ('code', 'prose'),
    f'--writer has the domains {corpus.domains}, but the study needs code and prose; see '
    'configs/watermark.py',
  )
  prompts = {name: split.tokens for name, split in zip(corpus.domains, corpus.train)}
  code = corpus.heldout.doc_domain == 0
  places = zip(corpus.heldout.offsets[:-1][code], corpus.heldout.offsets[1:][code])
  unmarked = np.concatenate([corpus.heldout.tokens[a:b] for a, b in places])
  known = proxy.of(small.config.model, small.variables)
  return Models(writer, judge, small, known, prompts, unmarked)


def _check_heldout(tokens: int, count: int):
  """Refuses too few held-out tokens for a seed's windows, or for the text around a pasted one.

  Args:
    tokens: of held-out code.
    count: windows of a seed.

  Raises:
    errors.InputError: names what there is and what is needed.
  """
  needed = max(_window_tokens(kind, count) for kind in partition.KINDS)
  errors.require(
    tokens >= needed,
    f'--windows={flags.FLAGS.windows} needs {needed} held-out tokens per seed, and there are '
    f'{tokens}; ask for fewer',
  )
  errors.require(
    tokens > arms_lib.HOST_TOKENS,
    f'the held-out code of --writer has {tokens} tokens, and must have more than '
    f'{arms_lib.HOST_TOKENS}, into which texts are pasted; train it on more text',
  )


def _window_scheme(kind: str, seed: int) -> partition.Scheme:
  """What the windows of human text are read with."""
  return arms_lib.Arm(kind, 0.0).scheme(secret(seed))


def _window_tokens(kind: str, count: int) -> int:
  """Tokens that so many windows take."""
  scheme = _window_scheme(kind, 0)
  return scheme.window + count * scheme.chunk_tokens


def _kept(
  path: pathlib.Path,
  settings: Mapping[str, Any],
  work: Callable[[Models, int, pathlib.Path], Any],
  models: Models,
  seed: int,
) -> Any:
  """The result at `path`, which is made if it is not there.

  Raises:
    errors.InputError: it is of other settings.
  """
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = {'settings': settings, 'result': work(models, seed, path.parent)}
    atomic_files.write_text(path, json.dumps(found) + '\n')
    print(f'{path}: {time.perf_counter() - started:.0f} s', flush=True)
  found = json.loads(path.read_text(encoding='utf-8'))
  study_record.require_same(path, found['settings'], settings)
  return found['result']


def secret(seed: int, other: int = 0) -> int:
  """The key of a seed: every seed has its own."""
  return int(np.random.default_rng((seed, other, 17)).integers(2**63))


def _proxy(models: Models, kind: str) -> proxy.Proxy | None:
  return models.known if kind == 'balance' else None


def _prompts(models: Models, seed: int) -> list[Ids]:
  """As many of code as of prose, alternately: pieces of training text."""
  rng, found = np.random.default_rng((seed, 1)), []
  for row in range(flags.FLAGS.prompts):
    tokens = models.prompts[report.DOMAINS[row % 2]]
    start = int(rng.integers(len(tokens) - arms_lib.PROMPT_TOKENS))
    found.append(tokens[start : start + arms_lib.PROMPT_TOKENS].astype(int).tolist())
  return found


def _messages(seed: int, count: int, bits: int) -> list[int]:
  return np.random.default_rng((seed, 2, bits)).integers(2**bits, size=count).tolist()


def _write(models: Models, seed: int, arm: arms_lib.Arm | None) -> list[Ids]:
  """Texts of an arm; unmarked ones without. All arms have the same prompts and draws."""
  prompts, count = _prompts(models, seed), arms_lib.NEW_TOKENS
  made = [processors.forbid_before(count, models.writer.tokenizer.end_ids)]
  if arm is not None:
    messages = _messages(seed, len(prompts), arm.message_bits)
    scheme = arm.scheme(secret(seed))
    made.append(encode.processor(scheme, _proxy(models, arm.kind), messages, arm.delta))
  how = sampling.Sampling(seed=seed)
  return models.writer.complete(prompts, count, how, processors=made).tokens


def _chunks(models: Models, arm: arms_lib.Arm, key: int, ids: Ids) -> list[decode.Chunk]:
  scheme = arm.scheme(key)
  vocab_size = models.writer.config.model.vocab_size
  hits = decode.look(scheme, _proxy(models, arm.kind), ids, vocab_size)
  return decode.read_all(scheme, hits)


def _texts(models: Models, seed: int, directory: pathlib.Path) -> dict[str, Any]:
  """By arm: per text, which chunks are right, p-values, the judge's loss, the writer's entropy."""
  prompts = _prompts(models, seed)
  unmarked = _write(models, seed, None)
  found: dict[str, Any] = {'unmarked': _judged(models, prompts, unmarked)}
  kept = {}
  for arm in arms_lib.ARMS:
    texts = _write(models, seed, arm)
    messages = _messages(seed, len(prompts), arm.message_bits)
    rows = [_chunks(models, arm, secret(seed), ids) for ids in texts]
    found[arm.name] = _judged(models, prompts, texts) | {
      'right': [_right(arm, row, message) for row, message in zip(rows, messages)],
      'p_values': [[chunk.p_value for chunk in row] for row in rows],
    }
    if arm.delta == arms_lib.ATTACKED and arm in arms_lib.SWEEP:
      kept[arm.kind] = texts
    print(f'seed {seed}, {arm.name}: {np.mean(found[arm.name]["right"]):.2f}', flush=True)
  atomic_files.write_text(directory / 'marked.json', json.dumps(kept))
  return found


def _right(arm: arms_lib.Arm, chunks: Sequence[decode.Chunk], message: int) -> list[bool]:
  want = arm.scheme(0).chunks(message)
  values = [chunk.value for chunk in chunks] + [-1] * (len(want) - len(chunks))
  return [value == chunk for value, chunk in zip(values, want)]


def _judged(models: Models, prompts: list[Ids], texts: list[Ids]) -> dict[str, list[float]]:
  """The judge's loss and the writer's entropy, nats per new token."""
  rows = np.array([prompt + text for prompt, text in zip(prompts, texts)], np.int32)
  start = arms_lib.PROMPT_TOKENS - 1
  loss, entropy = [], []
  for part in np.array_split(rows, max(1, len(rows) // 8)):
    judged = jax.nn.log_softmax(models.judge.logits(part)[:, start:-1])
    new = part[:, start + 1 :, None]
    loss += (-jnp.take_along_axis(judged, new, axis=-1).mean(axis=(1, 2))).tolist()
    own = jax.nn.log_softmax(models.writer.logits(part)[:, start:-1])
    entropy += (-(jnp.exp(own) * own).sum(axis=-1).mean(axis=1)).tolist()
  return {'loss': loss, 'entropy': entropy}


def _attacks(models: Models, seed: int, directory: pathlib.Path) -> dict[str, Any]:
  """By kind and attack: which texts still say the whole message."""
  kept = json.loads((directory / 'marked.json').read_text(encoding='utf-8'))
  return {kind: _attacked(models, seed, kind, texts) for kind, texts in kept.items()}


def _attacked(models: Models, seed: int, kind: str, texts: list[Ids]) -> dict[str, Any]:
  arm = arms_lib.Arm(kind, arms_lib.ATTACKED)
  prompts, tokenizer = _prompts(models, seed), models.writer.tokenizer
  messages = _messages(seed, len(prompts), arm.message_bits)
  rng = np.random.default_rng((seed, 3))
  found: dict[str, Any] = {'right': {}, 'replaced': {}, 'scan': []}

  def read(name: str, changed: list[Ids]):
    rows = [_chunks(models, arm, secret(seed), ids) for ids in changed]
    found['right'][name] = [_right(arm, row, m) for row, m in zip(rows, messages)]

  read('none', texts)
  logits = [
    np.asarray(models.judge.logits([prompt + ids]))[0, len(prompt) - 1 : -1]
    for prompt, ids in zip(prompts, texts)
  ]
  for share in arms_lib.SUBSTITUTED:
    done = [attacks.substitute(ids, row, share, rng) for ids, row in zip(texts, logits)]
    read(f'{100 * share:.0f} % substituted', [one.ids for one in done])
    shares = [one.replaced / len(ids) for one, ids in zip(done, texts)]
    found['replaced'][f'{share}'] = float(np.mean(shares))
  again = [attacks.encode_again(ids, tokenizer.decode, tokenizer.encode) for ids in texts]
  found['other_ids'] = float(np.mean([a != b for a, b in zip(again, texts)]))
  fill = arms_lib.NEW_TOKENS  # a text that has become too short for a chunk is filled with one id
  read('tokenised again', [ids + [0] * max(0, fill - len(ids)) for ids in again])
  rows = [_chunks(models, arm, secret(seed, 1), ids) for ids in texts]
  found['wrong_key_p_values'] = [[chunk.p_value for chunk in row] for row in rows]
  for ids, message in zip(texts, messages):
    start = int(rng.integers(len(models.unmarked) - arms_lib.HOST_TOKENS))
    host = models.unmarked[start : start + arms_lib.HOST_TOKENS].astype(int).tolist()
    found['scan'].append(_scanned(models, arm, seed, attacks.paste(ids, host, rng), message))
  return found


def _scanned(models: Models, arm: arms_lib.Arm, seed: int, ids: Ids, message: int) -> dict:
  """Whether a scan gives exactly the message, and how many it gives."""
  scheme = arm.scheme(secret(seed))
  vocab_size = models.writer.config.model.vocab_size
  hits = decode.look(scheme, _proxy(models, arm.kind), ids, vocab_size)
  said = [one.message for one in decode.scan(scheme, hits)]
  return {'exact': said == [message], 'found': len(said)}


def _windows(models: Models, seed: int, unused_directory: pathlib.Path) -> dict[str, Any]:
  """p-values of windows of human text, by kind.

  They stand beside each other at the beginning of the text, and are the same for every seed, which
  reads them with its own key.
  """
  found = {}
  count = flags.FLAGS.windows // len(local_jobs.seeds(flags.FLAGS.seeds))
  for kind in partition.KINDS:
    scheme = _window_scheme(kind, seed)
    size = scheme.chunk_tokens
    ids = models.unmarked[: _window_tokens(kind, count)].astype(int).tolist()
    hits = decode.look(scheme, _proxy(models, kind), ids, models.writer.config.model.vocab_size)
    parts = (slice(n * size, (n + 1) * size) for n in range(count))
    found[kind] = [decode.read(scheme, decode.Hits(hits.seeds[p], hits.found[p]), 0) for p in parts]
  return {kind: [(c.p_value, c.hits, c.places) for c in chunks] for kind, chunks in found.items()}


def _times(models: Models, seed: int, unused_directory: pathlib.Path) -> dict[str, float]:
  """Seconds per text, compiled before: writing, and reading 10 and 20 bits from 110 tokens."""
  found = {}
  texts: list[Ids] = []
  for name, arm in (
    ('no mark', None),
    *((kind, arms_lib.Arm(kind, 2.0)) for kind in partition.KINDS),
  ):
    texts = _write(models, seed, arm)
    start = time.perf_counter()
    texts = _write(models, seed, arm)
    found[f'write, {name}'] = (time.perf_counter() - start) / len(texts)
  for kind in partition.KINDS:
    for bits in (10, 20):
      arm = arms_lib.Arm(kind, 2.0, bits, bits)
      seconds = []
      for ids in texts[:8]:
        start = time.perf_counter()
        _chunks(models, arm, secret(seed), ids)
        seconds.append(time.perf_counter() - start)
      found[f'read {bits} bits, {kind}'] = statistics.median(seconds)  # few of them compile
  return found
