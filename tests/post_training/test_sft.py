"""Fine-tuning: rows of conversations teach the same however they are packed, and a run survives."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import moe_jax
from configs import sft
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.data import corpus, whole_documents
from moe_jax.post_training import expert_config
from moe_jax.training import objective
from tests import tiny
from tests.post_training.conftest import SIZES

QUIET = {'model__moe__balance__expert_level__weight': 0.0}


def conversations_split(lengths, seed=0):
  rng = np.random.default_rng(seed)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  return corpus.TokenSplit(
    tokens=rng.integers(32, size=offsets[-1]).astype(np.uint16),
    offsets=offsets,
    doc_bytes=np.asarray(lengths, np.int64),
    doc_domain=np.zeros(len(lengths), np.int32),
    learned=(rng.random(offsets[-1]) < 0.5).astype(np.uint8),
  )


def rows_of(split, length=16):
  rows = whole_documents.WholeDocuments(split, np.arange(split.num_documents), length)
  return [{key: row[key] for key in objective.BATCH_KEYS} for row in rows]


def padded(rows, num_rows):
  empty = {key: np.zeros_like(value) for key, value in rows[0].items()}
  empty['targets'] -= 1
  rows = rows + [empty] * (num_rows - len(rows))
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize('attention', ['mha', 'chunked'])
def test_packed_conversations_teach_what_they_teach_alone(attention):
  changes = QUIET | ({'model__attention__impl': 'chunked'} if attention == 'chunked' else {})
  split = conversations_split([9, 8, 6, 5, 4, 3])
  together = rows_of(split)
  alone = []
  for i in range(split.num_documents):
    here = slice(*split.offsets[i : i + 2])
    one = dataclasses.replace(
      split,
      tokens=split.tokens[here],
      learned=split.learned[here],
      offsets=np.array([0, here.stop - here.start]),
      doc_bytes=split.doc_bytes[i : i + 1],
      doc_domain=split.doc_domain[i : i + 1],
    )
    alone += rows_of(one)
  assert len(together) == 2 and len(alone) == 6
  gradients = tiny.gradients(**changes)
  params = tiny.params(tiny.make(**changes).model)
  loss, grads = gradients(params, padded(together, 8))
  other_loss, other_grads = gradients(params, padded(alone, 8))
  np.testing.assert_allclose(loss.main, other_loss.main, rtol=1e-6)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * scale, rtol=0)


def test_text_and_conversations_do_not_mix():
  values = sft.get_config().to_dict()
  values['objective']['inherit'] = False
  values['data'] |= {'tokenizer': 'bytes', 'chat_format': 'deepseek_llm'}
  parse.from_dict(values)
  values['data'] |= {'source': 'synthetic', 'path': ''}
  words = "config.data.source with config.objective.kind='sft' must name conversations only"
  with pytest.raises(errors.InputError, match=words):
    parse.from_dict(values)
  values['data']['source'] = 'arithmetic'
  values['objective']['kind'] = 'next_token'
  with pytest.raises(errors.InputError, match="must name text only .*, and has 'arithmetic'"):
    parse.from_dict(values)


def tune(base, workdir, page='sft', **changes):
  chats = workdir.parent / 'chats.jsonl'
  if not chats.exists():
    rows = [{'prompt': f'Say {i} twice.', 'completion': f'{i} {i}'} for i in range(300)]
    chats.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  given = SIZES | {
    'init_from': str(base.directory),
    'data.source': 'conversations',
    'data.path': str(chats),
    'data.cache_dir': str(workdir.parent / 'cache'),
    'train.num_steps': 4,
    'optim.warmup_steps': 0,
    'optim.peak_lr': 0.01,
  }
  return moe_jax.train(page, workdir, report=False, say=print, **given | changes)


@pytest.mark.slow
def test_a_run_is_tuned_and_goes_on_bit_by_bit(base, tmp_path):
  whole = tune(base, tmp_path / 'whole')
  assert whole.config.model.embed_dim == base.config.model.embed_dim
  assert whole.config.model.moe.loss('expert_level').weight == 0
  before, after = (
    run.variables['router_state']['moe_layers']['moe']['expert_bias'] for run in (base, whole)
  )
  np.testing.assert_array_equal(before, after)  # frozen, and still there
  assert np.abs(before).max() > 0
  interrupted = tmp_path / 'interrupted'
  tune(base, interrupted)
  (interrupted / 'checkpoints' / '4').rename(tmp_path / 'lost')
  resumed = tune(base, interrupted)
  for a, b in zip(
    jax.tree.leaves(whole.variables), jax.tree.leaves(resumed.variables), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  losses = [
    [json.loads(line)['loss'] for line in (run.directory / 'metrics.jsonl').open()]
    for run in (whole, resumed)
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
  figures = whole.evaluate(progress=False)
  assert 0 < figures.bits_per_byte < 20


@pytest.mark.slow
def test_chosen_experts_are_tuned_and_the_file_is_read_once(base, tmp_path):
  """Resumed bit by bit from elsewhere, refused when the experts are others."""
  path, moved = tmp_path / 'expert_cfg.json', tmp_path / 'moved.json'
  number = base.config.model.num_moe_layers
  layers = range(base.config.model.num_dense_layers, base.config.model.num_layers)
  assert number == len(layers) > 0
  expert_config.write(path, expert_config.ExpertConfig(dict.fromkeys(layers, [2, 0]), False, False))

  def tuned(workdir, path):
    return tune(base, workdir, 'esft', **{'trainable.expert_config': str(path)})

  whole = tuned(tmp_path / 'whole', path)
  assert whole.config.trainable.experts == ((2, 0),) * number
  before, after = (jax.device_get(run.variables['params']) for run in (base, whole))
  for name in ('gate_up', 'down'):
    a, b = (tree['moe_layers']['moe'].pop(name) for tree in (before, after))
    trained = np.isin(np.arange(a.shape[1]), [0, 2])
    np.testing.assert_array_equal(a[:, ~trained], b[:, ~trained])
    assert (a[:, trained] != b[:, trained]).mean() > 0.5
  jax.tree.map(np.testing.assert_array_equal, before, after)

  interrupted = tmp_path / 'interrupted'
  tuned(interrupted, path)
  (interrupted / 'checkpoints' / '4').rename(tmp_path / 'lost')
  path.rename(moved)
  resumed = tuned(interrupted, moved)
  jax.tree.map(np.testing.assert_array_equal, *(run.variables for run in (whole, resumed)))
  others = dict.fromkeys(layers, [2, 1])
  expert_config.write(moved, expert_config.ExpertConfig(others, False, False))
  with pytest.raises(errors.InputError, match='holds a run of another config: trainable.experts'):
    tuned(interrupted, moved)
