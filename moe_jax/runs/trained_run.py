"""A trained run: what it holds, and how it is read from its directory.

Whatever it was trained on, it is loaded onto the devices that are here.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import errors, trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import integrity
from moe_jax.config import mesh_config, parse, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import kept_files, pipeline
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.runs import reference_scores, working_directory
from moe_jax.storage import fetch
from moe_jax.training import lora

NO_DATA = 'imported'  # data fingerprint of a model whose training text is not known
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
  """A model with what is needed to use it."""

  cfg: schema.Config
  mesh: jax.sharding.Mesh
  variables: trees.Variables  # params and router_state
  tokenizer: tokenizer_lib.Tokenizer
  step: int  # optimizer steps done
  data_fingerprint: str  # of the corpus it was trained on
  interrupted_by: str = ''  # name of the signal that ended training early


def digest(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """What tells one tokenizer from another in `meta`."""
  return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def meta(
  cfg: schema.Config,
  corpus: corpus_lib.Corpus,
  stream: pipeline.StreamStart = pipeline.START,
) -> dict[str, Any]:
  """What is saved with every checkpoint of a run."""
  return {
    'config': parse.to_dict(cfg),
    'data_fingerprint': corpus.fingerprint,
    'tokenizer': digest(corpus.tokenizer),
    'stream': stream._asdict(),
  }


def read_meta(
  workdir: str | os.PathLike[str], step: int | None = None, flag: str = '--workdir'
) -> dict[str, Any]:
  """The `meta` of the newest checkpoint, or of that of `step`; restores no arrays.

  Whether the arrays are whole is not known: `load` may go back to an older one, with another meta.
  `flag` is what the user calls the directory.

  Raises:
    errors.InputError: there is none, or it is damaged.
  """
  workdir = fetch.local(workdir, flag)
  if not (workdir / 'checkpoints').is_dir():
    raise errors.InputError(
      f'{flag}={workdir} holds no checkpoints; train first: python -m experiments.train '
      f'--config=configs/quickstart.py --workdir={workdir}'
    )
  with reader(workdir) as checkpointer:
    found = checkpointer.read_meta(step)
  if found is None:
    raise errors.InputError(
      f'{flag}={workdir} holds no finished checkpoint yet; wait for step '
      'config.checkpoint.save_every, or for the end of the run'
    )
  return found


def read_config(
  workdir: str | os.PathLike[str], step: int | None = None, flag: str = '--workdir'
) -> schema.Config:
  """The config of a checkpoint, see `read_meta`; what is computed takes that of what was loaded."""
  return parse.from_record(read_meta(workdir, step, flag)['config'])


def reader(workdir: pathlib.Path) -> checkpointer_lib.Checkpointer:
  """Opens the checkpoints of a workdir, to look only."""
  return checkpointer_lib.Checkpointer(workdir / 'checkpoints', None, read_only=True)


def load(workdir: str | os.PathLike[str], step: int | None = None, flag: str = '--workdir') -> Run:
  """Loads a checkpoint of a workdir, `flag`: the newest whole one, or that of `step`.

  Raises:
    errors.InputError: there is none, it is damaged or holds numbers that are not finite, or the
      tokenizer is not the one trained with.
  """
  workdir = fetch.local(workdir, flag)
  read_meta(workdir, step, flag)
  with reader(workdir) as checkpointer:
    # The optimizer's moments, twice the size of the weights, are left on the disk.
    restored = errors.present(
      checkpointer.restore(abstract_variables, step, partial=True),
      f'{flag}={workdir} holds no finished checkpoint; give a workdir that has one',
    )
  # Of the step that was whole: a newer one that is damaged may have had another.
  cfg, mesh = on_devices_here(parse.from_record(restored.meta['config']))
  where = f'{flag}={workdir}: the checkpoint of step {restored.step}'
  integrity.require_finite(restored.state, where)
  if not (workdir / 'tokenizer.json').is_file():
    raise errors.InputError(
      f'{flag}={workdir} has lost its tokenizer.json, without which its checkpoints mean '
      'nothing; put the file back'
    )
  data = cfg.data
  tokenizer = tokenizer_lib.load(
    workdir / 'tokenizer.json', data.bos_token, data.eos_token, trusted=True
  )
  tokenizer_lib.check_vocab_size(tokenizer, cfg.model.vocab_size)
  if digest(tokenizer) != restored.meta['tokenizer']:
    raise errors.InputError(
      f'{workdir / "tokenizer.json"} is not the tokenizer that the checkpoint of step '
      f'{restored.step} was trained with; put the original file back'
    )
  tokenizer.end_ids = kept_files.end_ids(workdir / kept_files.DIRECTORY, tokenizer)
  variables = restored.state
  if cfg.trainable.kind == 'lora':
    variables = {**variables, 'params': jax.jit(lora.merged)(variables['params'])}
  return Run(
    cfg,
    mesh,
    variables,
    tokenizer,
    restored.step,
    restored.meta['data_fingerprint'],
  )


def abstract_variables(meta: trees.Json) -> dict[str, Any]:
  """Shape, dtype and sharding of what is read of the checkpoint with this `meta`."""
  cfg, mesh = on_devices_here(parse.from_record(meta['config']))

  def with_pairs(params: trees.Params) -> trees.Params:
    return lora.started(cfg, params, jax.random.key(0))

  return model_variables.abstract_variables(cfg.model, mesh, with_pairs)


def on_devices_here(cfg: schema.Config) -> tuple[schema.Config, jax.sharding.Mesh]:
  """A config whose mesh has all devices along `data`, whatever it was trained on, and the mesh."""
  whole = dict.fromkeys(mesh_config.AXES, 1) | {'data': -1}
  cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **whole))
  return cfg, partitioning.make_mesh(cfg.mesh)


def encode_prompt(run: Run, prompt: str, *, special_tokens: bool = False) -> list[int]:
  """Ids of a text to be continued, with the begin-of-document token in front.

  Args:
    run: whose tokenizer reads it.
    prompt: the text.
    special_tokens: the spelling of a special token is that token; one at the beginning that is the
      begin-of-document token stays the only one.

  Raises:
    errors.InputError: it is no UTF-8 text.
  """
  try:
    prompt.encode()
  except UnicodeEncodeError as e:
    raise errors.InputError(f'--prompt={prompt!r} must be UTF-8 text; correct its bytes') from e
  ids = run.tokenizer.encode(prompt, special_tokens=special_tokens)
  begun = special_tokens and ids[:1] == [run.tokenizer.bos_id]
  return ids if begun else [run.tokenizer.bos_id, *ids]


def heldout_corpus(run: Run, workdir: str | os.PathLike[str], warn: Say) -> corpus_lib.Corpus:
  """The corpus of a loaded run, tokenised with the run's own tokenizer."""
  path = str(pathlib.Path(workdir) / 'tokenizer.json')
  data = working_directory.resolved(run.cfg, workdir).data
  data = dataclasses.replace(data, tokenizer=path)
  corpus = corpus_lib.load_corpus(data, run.cfg.model.vocab_size, run.cfg.train.seed)
  if run.data_fingerprint not in (corpus.fingerprint, NO_DATA):
    warn(
      'the text at config.data.path has changed since training (another Python version, edited '
      'files): held-out figures are of the text as it is now'
    )
  if run.cfg.objective.kind == 'dpo':
    found = reference_scores.attached(run.cfg, fetch.local(workdir, '--workdir'), corpus)
    if found is None:
      warn(
        f'{workdir} has no {reference_scores.FILE} of these pairs, so held-out figures are of the '
        'answers alone, without rewards'
      )
    return found or corpus
  return corpus
