"""`config.init_from` names a downloaded chat checkpoint: tuned, exported, and what it came with."""

import json

import jax
import numpy as np
import pytest

import moe_jax
from configs import base
from moe_jax import errors
from moe_jax.api import train as train_lib
from moe_jax.data import kept_files
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface, start_weights
from moe_jax.runs import trained_run
from tests import tiny
from tests.interop import checkpoints

TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }} '
  "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


@pytest.fixture(scope='module')
def downloaded(tmp_path_factory):
  """A tied MoE with a chat template and two end tokens."""
  hf = checkpoints.config('deepseek', torch_dtype='float32', tie_word_embeddings=True)
  weights = checkpoints.tensors(hf, np.float32)
  directory = checkpoints.write(tmp_path_factory.mktemp('chat') / 'in', hf, weights)
  path = directory / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'chat_template': TEMPLATE}))
  (directory / 'generation_config.json').write_text('{"eos_token_id": [1, 5]}')
  return directory


def given(place, tmp_path) -> dict:
  chats = tmp_path / 'chats.jsonl'
  rows = [{'prompt': f'say {"abcdef"[i % 6]}', 'completion': 'abcdef'[i % 6]} for i in range(60)]
  chats.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return {
    'init_from': str(place),
    'data.source': 'conversations',
    'data.path': str(chats),
    'data.cache_dir': str(tmp_path / 'cache'),
    'data.heldout_fraction': 0.3,
    'mesh.data': 1,
    'optim.warmup_steps': 0,
    'train.num_steps': 2,
    'train.batch_size': 2,
    'train.eval_every': 0,
    'train.log_every': 1,
  }


def test_the_model_and_the_form_of_conversations_are_those_of_the_files(downloaded, tmp_path):
  cfg = train_lib.resolve('sft', given(downloaded, tmp_path))
  assert cfg.model.tie_embeddings and cfg.model.embed_dim == checkpoints.D
  assert (cfg.data.chat_format, cfg.data.chat_template) == ('template', TEMPLATE)
  assert (cfg.data.bos_token, cfg.data.eos_token) == ('<s>', '</s>')
  assert cfg.data.tokenizer == str(downloaded / 'tokenizer.json')
  assert cfg.model.moe.loss('expert_level').weight == 0


def test_the_small_files_come_along(downloaded, tmp_path):
  source = start_weights.of(tiny.make(init_from=str(downloaded)))
  source.carry(tmp_path)
  assert kept_files.chat_template(tmp_path / 'hf') == TEMPLATE
  assert json.loads((tmp_path / 'hf/moe_jax.json').read_text())['layout']['lm_head'] is False


def test_what_is_no_checkpoint_is_a_run(tmp_path):
  assert start_weights.of(tiny.make()) is None
  with pytest.raises(errors.InputError, match='config.init_from=.* holds no checkpoints'):
    start_weights.of(tiny.make(init_from=str(tmp_path)))


@pytest.mark.slow
def test_weights_are_those_of_the_files(downloaded, tmp_path):
  cfg, said = train_lib.resolve('sft', given(downloaded, tmp_path)), []
  found = start_weights.of(cfg).read(cfg, tiny.mesh(data=1), said.append)
  _, want = huggingface.load_variables(downloaded, base.get_config().to_dict())
  jax.tree.map(np.testing.assert_array_equal, found['params'], want['params'])
  assert 'a downloaded checkpoint' in said[0] and 'head' not in found['params']


@pytest.mark.slow  # trains twice
def test_tuned_and_exported_it_keeps_what_it_came_with(downloaded, tmp_path, monkeypatch):
  """The run is that of an import; the export has the template, all end tokens, and one matrix."""
  make = partitioning.make_mesh
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg: make(cfg, jax.devices()[:1]))
  tuned = moe_jax.train('sft', tmp_path / 'run', report=False, **given(downloaded, tmp_path))
  values = base.get_config().to_dict()
  huggingface.import_checkpoint(downloaded, values, tmp_path / 'imported')
  other = given(tmp_path / 'imported', tmp_path)
  again = moe_jax.train('sft', tmp_path / 'again', report=False, **other)
  jax.tree.map(np.testing.assert_array_equal, tuned.variables, again.variables)
  loaded = moe_jax.load(tmp_path / 'run')
  assert loaded.tokenizer.end_ids == (1, 5)
  assert loaded.chat('say b', 3, temperature=0) == tuned.chat('say b', 3, temperature=0)

  out = tmp_path / 'out'
  huggingface.export_checkpoint(tmp_path / 'run', out)
  for name in ('tokenizer_config.json', 'generation_config.json', 'tokenizer.json'):
    assert (out / name).read_bytes() == (downloaded / name).read_bytes(), name
  assert json.loads((out / 'config.json').read_text())['tie_word_embeddings'] is True
  before, after = checkpoints.read(downloaded), checkpoints.read(out)
  assert before.keys() == after.keys() and 'lm_head.weight' not in after
  assert before['model.embed_tokens.weight'] != after['model.embed_tokens.weight']
  exported = moe_jax.load(out)
  assert exported.chat('say b', 3, temperature=0) == tuned.chat('say b', 3, temperature=0)
  np.testing.assert_array_equal(exported.logits('say b'), tuned.logits('say b'))
  # And goes on as a run does, from another place of the same files.
  assert trained_run.read_config(tmp_path / 'run').data.chat_template == TEMPLATE
