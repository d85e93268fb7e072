"""The actions key, encode, decode and attack."""

import json
import pathlib
import secrets
from typing import Any

import numpy as np
from absl import flags

from experiments.common import cli, json_output
from moe_jax import atomic_files, errors
from moe_jax.api import load
from moe_jax.api import run as run_lib
from moe_jax.inference import processors, sampling
from moe_jax.runs import trained_run
from moe_jax.watermark import attacks, key_file, partition, proxy
from moe_jax.watermark import decode as decode_lib
from moe_jax.watermark import encode as encode_lib

FIELDS = {'prompt', 'ids', 'text', 'message'}


def key():
  """Writes a new key."""
  values = flags.FLAGS
  kind = values.kind if values.proxy or values['kind'].present else 'vanilla'
  secret = secrets.randbits(64) if values.secret is None else values.secret
  scheme = partition.Scheme(
    kind, secret, values.message_bits, values.chunk_bits, values.tokens_per_bit
  )
  run, known = _reader(kind)
  made = key_file.Key(
    scheme,
    trained_run.digest(run.tokenizer),
    run.config.model.vocab_size,
    key_file.digest(run.variables) if known else '',
  )
  key_file.write(cli.required('key'), made)
  print(
    f'{values.key}: {kind}, {scheme.message_bits} bits in {scheme.num_tokens} tokens; keep it: '
    'without it no message can be read, and with it anyone can write one'
  )


def encode():
  """Writes texts that carry messages."""
  values = flags.FLAGS
  made, known = _key()
  run = load.load(cli.required('workdir'), flag='--workdir')
  key_file.check(made, trained_run.digest(run.tokenizer), run.config.model.vocab_size, made.proxy)
  prompts = values.prompt or []
  messages = [*values.message, *(_number(text, made.scheme) for text in values.text)]
  errors.require(bool(prompts), '--prompt is missing: give a text to continue')
  errors.require(
    len(messages) == len(prompts),
    f'--message and --text are given {len(messages)} times for {len(prompts)} --prompt; give one '
    'for each',
  )
  count = values.max_new_tokens or made.scheme.num_tokens
  encode_lib.check_length(made.scheme, count)
  marker = encode_lib.processor(made.scheme, known, messages, values.delta)
  whole = processors.forbid_before(made.scheme.num_tokens, run.tokenizer.end_ids)
  how = sampling.Sampling(values.temperature, values.top_k, values.top_p, values.seed)
  out = pathlib.Path(cli.required('out'))
  ids = [run.encode(text) for text in prompts]
  found = run.complete(ids, count, how, processors=[marker, whole])
  rows = zip(prompts, found.tokens, found.texts, messages)
  _write(out, [dict(zip(('prompt', 'ids', 'text', 'message'), row)) for row in rows])


def decode():
  """Prints what texts say, one JSON object per line."""
  values = flags.FLAGS
  made, known = _key()
  tokenizer = _reader(made.scheme.kind)[0].tokenizer
  if values.file:
    texts = [tokenizer.encode(_text(values.file))]
  else:
    texts = [
      tokenizer.encode(one['text']) if values.from_text else one['ids'] for one in _read_texts()
    ]
  for ids in texts:
    hits = decode_lib.look(made.scheme, known, ids, made.vocab_size)
    if values.scan:
      found = decode_lib.scan(made.scheme, hits, threshold=values.threshold)
      said = [_said(made.scheme, one.chunks, one.p_value) | {'start': one.start} for one in found]
      json_output.show(said)
    else:
      chunks = decode_lib.read_all(made.scheme, hits)
      json_output.show(_said(made.scheme, chunks, max(chunk.p_value for chunk in chunks)))


def attack():
  """Writes texts as an attacker leaves them."""
  values, out = flags.FLAGS, pathlib.Path(cli.required('out'))
  texts = _read_texts()
  run = load.load(cli.required('workdir'), flag='--workdir')
  rng = np.random.default_rng(values.seed)
  host = run.tokenizer.encode(_text(cli.required('file'))) if values.attack == 'paste' else []
  changed = []
  for one in texts:
    ids = one['ids']
    if values.attack == 'substitute':
      prompt = run.encode(one['prompt'])
      logits = np.asarray(run.logits([prompt + ids]))[0, len(prompt) - 1 : -1]
      ids = attacks.substitute(ids, logits, values.share, rng).ids
    elif values.attack == 'cut':
      ids = attacks.cut(ids, values.share, rng)
    elif values.attack == 'paste':
      ids = attacks.paste(ids, host, rng)
    else:
      ids = attacks.encode_again(ids, run.tokenizer.decode, run.tokenizer.encode)
    changed.append(one | {'ids': ids, 'text': run.tokenizer.decode(ids)})
  _write(out, changed)


def _reader(kind: str) -> tuple[run_lib.Run, proxy.Proxy | None]:
  """The run that has the tokenizer, which is the proxy if there is one; and the proxy."""
  if kind == 'vanilla':
    errors.require(
      not flags.FLAGS.proxy, "a 'vanilla' watermark has no proxy: name a run with --workdir instead"
    )
    return load.load(cli.required('workdir'), flag='--workdir'), None
  run = load.load(cli.required('proxy'), flag='--proxy')
  return run, proxy.of(run.config.model, run.variables)


def _key() -> tuple[key_file.Key, proxy.Proxy | None]:
  """The key, and the proxy that it was made with."""
  made = key_file.read(cli.required('key'))
  run, known = _reader(made.scheme.kind)
  key_file.check(
    made,
    trained_run.digest(run.tokenizer),
    run.config.model.vocab_size,
    key_file.digest(run.variables) if known else '',
  )
  return made, known


def _number(text: str, scheme: partition.Scheme) -> int:
  """A short text as a message: its bytes, filled up with zeros."""
  data, room = text.encode(), scheme.message_bits // 8
  errors.require(
    len(data) <= room,
    f'--text={text!r} has {len(data)} bytes, but message_bits={scheme.message_bits} of the key '
    f'hold {room}; shorten it, or make a key with message_bits={8 * len(data)}',
  )
  return int.from_bytes(data.ljust(room, b'\0'), 'big')


def _said(scheme: partition.Scheme, chunks: Any, p_value: float) -> dict[str, Any]:
  """What chunks say, and how sure that is; no message if some are missing or it is not sure."""
  whole = len(chunks) == scheme.num_chunks
  sure = whole and 1 - p_value >= flags.FLAGS.threshold
  message: Any = scheme.message([chunk.value for chunk in chunks]) if sure else None
  if sure and flags.FLAGS.as_text:
    message = message.to_bytes(scheme.message_bits // 8 + 1, 'big').strip(b'\0')
    message = message.decode('utf-8', 'replace')
  said = {'message': message, 'confidence': 1 - p_value}
  return said | {'chunks': [chunk._asdict() | {'confidence': chunk.confidence} for chunk in chunks]}


def _text(path: str) -> str:
  try:
    return pathlib.Path(path).read_text(encoding='utf-8-sig')
  except (OSError, ValueError) as e:
    raise errors.InputError(f'--file={path} cannot be read ({e}); give a UTF-8 text') from e


def _read_texts() -> list[dict[str, Any]]:
  path = cli.required('texts')
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    errors.require(
      isinstance(found, list) and all(set(one) >= FIELDS for one in found),
      f'--texts={path} is no list of objects with {", ".join(sorted(FIELDS))}; give a file of '
      'encode or attack',
    )
    return found
  except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError) as e:
    raise errors.InputError(
      f'--texts={path} cannot be read ({e}); give a file of encode or attack'
    ) from e


def _write(path: pathlib.Path, texts: list[dict[str, Any]]):
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(path, json.dumps(texts, indent=1) + '\n')
  print(f'{path}: {len(texts)} texts, {sum(len(one["ids"]) for one in texts)} tokens')
