"""The file that a message is written and read with: scheme, hash, tokenizer and proxy."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from moe_jax import atomic_files, errors, trees
from moe_jax.watermark import partition


@dataclasses.dataclass(frozen=True)
class Key:
  """What writer and reader share. Whoever has it can write messages too."""

  scheme: partition.Scheme
  tokenizer: str  # `trained_run.digest`
  vocab_size: int  # V of the model's logits
  proxy: str  # `digest` of the proxy's weights; '' of a 'vanilla' scheme


def digest(variables: trees.Variables) -> str:
  """What tells the weights of one model from those of another."""
  hasher = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    array = np.asarray(jax.device_get(leaf))
    hasher.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
    hasher.update(np.ascontiguousarray(array).tobytes())
  return hasher.hexdigest()


def write(path: str | os.PathLike[str], key: Key):
  """Writes a key as JSON, whole or not at all.

  Raises:
    errors.InputError: there is a file, which may be all that can read some text.
  """
  errors.require(
    not pathlib.Path(path).exists(),
    f'--key={path} is there already, and text that was written with it can be read with nothing '
    'else; take another name',
  )
  fields = {'mixing': partition.MIXING} | dataclasses.asdict(key)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(path, json.dumps(fields, indent=2) + '\n')


def read(path: str | os.PathLike[str]) -> Key:
  """Reads a key.

  Raises:
    errors.InputError: no such file, not a key, or one of another hash.
  """
  try:
    fields: dict[str, Any] = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    mixing = fields.pop('mixing')
    errors.require(
      mixing == partition.MIXING,
      f'--key={path} is of the hash {mixing!r}, and this version has {partition.MIXING!r}; read it '
      'with the version that wrote it',
    )
    return Key(scheme=partition.Scheme(**fields.pop('scheme')), **fields)
  except errors.InputError:
    raise
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise errors.InputError(
      f'--key={path} is no readable key ({type(e).__name__}: {e}); make one: '
      'python -m experiments.watermark key'
    ) from e


def check(key: Key, tokenizer: str, vocab_size: int, proxy: str):
  """Refuses a model or a proxy that the key was not made for.

  Args:
    key: the key.
    tokenizer: `trained_run.digest` of the model's or the proxy's.
    vocab_size: V of its logits.
    proxy: `digest` of the proxy, or ''.

  Raises:
    errors.InputError: names what differs.
  """
  errors.require(
    (key.tokenizer, key.vocab_size) == (tokenizer, vocab_size),
    f'the key was made for another tokenizer (digest {key.tokenizer[:12]}, {key.vocab_size} ids) '
    f'than that of the run ({tokenizer[:12]}, {vocab_size}); name a run with that tokenizer',
  )
  errors.require(
    key.proxy == proxy,
    f'the key was made for {f"the proxy {key.proxy[:12]}" if key.proxy else "no proxy"}, and '
    f'--proxy is {f"{proxy[:12]}" if proxy else "not given"}; give the run that it was made with',
  )
