"""Whether a run can be what its config says: found out before anything is compiled or written."""

import os
import pathlib

import jax
from absl import logging

from moe_jax import errors, trees
from moe_jax.config import parse, router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import kept_files, pipeline
from moe_jax.devices import partitioning
from moe_jax.inference import generate
from moe_jax.models.attention import kernels
from moe_jax.models.experts import sorted_plan
from moe_jax.processes import agreement
from moe_jax.runs import run_record, trained_run, warm_start


def prepare(cfg: schema.Config) -> tuple[jax.sharding.Mesh, corpus_lib.Corpus]:
  """The devices and the text of a run, checked against its config.

  Raises:
    errors.InputError: see the message.
  """
  mesh = partitioning.make_mesh(cfg.mesh)
  check_mesh(cfg, mesh)
  corpus = corpus_lib.load_corpus(
    cfg.data, cfg.model.vocab_size, cfg.train.seed, progress=agreement.is_first()
  )
  _check_rows(cfg, corpus, mesh)
  _warn_of_single_gate(cfg.model)
  _warn_of_left_out(cfg, corpus)
  if cfg.train.sample_prompt and cfg.train.sample_tokens:
    _check_sample_group(cfg.model)
    prompt = corpus.tokenizer.encode(cfg.train.sample_prompt)
    names = ('config.train.sample_prompt', 'config.train.sample_tokens')
    generate.check_router(cfg.model)
    generate.check_lengths(cfg.model, 1 + len(prompt), cfg.train.sample_tokens, names)
  return mesh, corpus


def check_mesh(cfg: schema.Config, mesh: jax.sharding.Mesh):
  """Refuses what does not run on these devices: sizes that they cannot split, kernels that cannot.

  Raises:
    errors.InputError: names the field and the ways out.
  """
  partitioning.check(cfg, mesh)
  _check_sort_key(cfg, mesh)
  attention = cfg.model.attention
  head_dim, v_head_dim = attention.head_dim, attention.head_dim
  if attention.kind == 'mla':
    head_dim = attention.mla.qk_nope_head_dim + attention.mla.qk_rope_head_dim
    v_head_dim = attention.mla.v_head_dim
  with partitioning.activate(mesh):
    kernels.choose(
      attention.impl,
      head_dim=head_dim,
      v_head_dim=v_head_dim,
      length=cfg.model.max_seq_len,
      dtype=cfg.model.dtype,
    )


def _warn_of_single_gate(model: schema.ModelConfig):
  """Says that a router learns nothing from the cross-entropy."""
  moe = model.moe
  if model.is_moe and moe.norm_topk_prob and router_traits.of(moe).active_experts(moe, True) == 1:
    logging.warning(
      'config.model.moe.norm_topk_prob=True divides the gate of a token by itself where it has one '
      'expert: the gate is 1, and the router gets no gradient but that of balance losses; set it '
      'to False.'
    )


def _warn_of_left_out(cfg: schema.Config, corpus: corpus_lib.Corpus):
  """Says how many conversations are longer than a row, which are left out rather than cut."""
  for name, splits in (('training', corpus.train), ('held-out', (corpus.heldout,))):
    left_out = sum(pipeline.num_left_out(split, cfg.model.max_seq_len) for split in splits)
    if left_out:
      total = sum(split.num_documents for split in splits)
      logging.warning(
        f'{left_out} of {total} {name} conversations have more tokens than '
        f'config.model.max_seq_len={cfg.model.max_seq_len} and are left out, as none is cut.'
      )


def _check_sample_group(model: schema.ModelConfig):
  """Refuses drops in groups of rows for the sample at the end, which is one row."""
  capacity = model.moe.capacity
  errors.require(
    not model.is_moe
    or capacity.policy == 'none'
    or not capacity.at_eval
    or capacity.group_rows <= 1,
    f'config.model.moe.capacity.group_rows={capacity.group_rows} with at_eval=True lets that many '
    "rows compete in generation too, and the sample is one; set config.train.sample_prompt='', "
    'group_rows=0 or at_eval=False',
  )


def _batch_sizes(cfg: schema.Config) -> list[int]:
  return [cfg.train.batch_size, *(size for _, size in cfg.train.batch_ramp)]


def _check_rows(cfg: schema.Config, corpus: corpus_lib.Corpus, mesh: jax.sharding.Mesh):
  pipeline.check_corpus(
    corpus,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=_batch_sizes(cfg),
    num_shards=partitioning.row_ways(mesh),
  )
  pipeline.check_heldout(corpus, cfg.model.max_seq_len)


def _check_sort_key(cfg: schema.Config, mesh: jax.sharding.Mesh):
  """Refuses a forward pass whose choices per device overflow the sort key of the dropless plan.

  A device of an expert-parallel group may be sent the tokens of all of it.
  """
  model, data_ways, ways = cfg.model, partitioning.row_ways(mesh), mesh.shape['expert']
  if not model.is_moe or model.moe.dispatch != 'dropless':
    return
  rows = cfg.train.micro_batch_size or max(_batch_sizes(cfg))
  per_row = model.max_seq_len // mesh.shape['sequence'] * model.moe.num_experts_per_tok * ways
  legal = max(sorted_plan.max_choices(model.moe.num_experts // ways) // per_row, 1) * data_ways
  if legal < rows:
    raise errors.InputError(
      f'config.train.micro_batch_size={cfg.train.micro_batch_size} (0 = the whole batch) puts '
      f'{rows // data_ways} rows on a device, more tokens than the int32 sort key of '
      f'{model.moe.num_experts} experts can number; choose a divisor of the batch size of at most '
      f'{legal}'
    )


def check_source(cfg: schema.Config, source: trees.Json | None, corpus: corpus_lib.Corpus):
  """Refuses weights that do not fit the model, or were trained with another tokenizer.

  Args:
    cfg: the run.
    source: `meta` of the checkpoint at its `init_from`; None without one.
    corpus: of the run.

  Raises:
    errors.InputError: names what is different.
  """
  if source is None:
    return
  warm_start.check(cfg, parse.from_record(source['config']))
  if not cfg.model.tie_embeddings:
    kept_files.require_untied(cfg.init_from, 'config.init_from')
  errors.require(
    source['tokenizer'] == trained_run.digest(corpus.tokenizer),
    f'config.data.tokenizer={cfg.data.tokenizer!r} is not the tokenizer of config.init_from='
    f'{cfg.init_from}, whose embedding is used; pass '
    f'--config.data.tokenizer={os.path.join(cfg.init_from, "tokenizer.json")}',
  )


def check_processes(workdir: pathlib.Path | None, corpus: corpus_lib.Corpus):
  """Makes sure that all processes see the same text and the same directory.

  Args:
    workdir: the directory; None where each process has its own.
    corpus: the text.

  Raises:
    errors.InputError: on all processes; names what is different.
  """
  digest = trained_run.digest(corpus.tokenizer)
  agreement.require_same(
    {'the text of config.data': corpus.fingerprint, 'the tokenizer of config.data': digest}
  )
  if workdir is not None:
    agreement.require_shared(workdir)


def check_continues(cfg: schema.Config, meta: trees.Json, corpus: corpus_lib.Corpus, allow: bool):
  """Refuses to continue on other token ids and, unless allowed, under other settings.

  Raises:
    errors.InputError: names what is different.
  """
  if meta['tokenizer'] != trained_run.digest(corpus.tokenizer):
    raise errors.InputError(
      f'config.data.tokenizer: the checkpoint of step {meta["step"]} was trained with another '
      'tokenizer, so its vocabulary would not match; keep the old one with '
      '--config.data.tokenizer=WORKDIR/tokenizer.json, or use another --workdir'
    )
  if allow:
    return
  if meta['data_fingerprint'] != corpus.fingerprint:
    raise errors.InputError(
      f'config.data.path: the corpus has changed since the checkpoint of step {meta["step"]} (was '
      f'{meta["data_fingerprint"]}, is {corpus.fingerprint}), so the run would not continue on the '
      'same data; restore the text, use another --workdir, or pass --allow_config_change'
    )
  changes, _ = run_record.differences(meta['config'], cfg)
  if changes and not run_record.prolongs(changes, cfg, lambda step: step == str(meta['step'])):
    raise errors.InputError(
      f'the checkpoint of step {meta["step"]} was trained with another config: '
      f'{"; ".join(changes)}; undo the change, use another --workdir, or pass --allow_config_change'
    )
