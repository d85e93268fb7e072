"""A chat checkpoint made by transformers is tuned here, and answers in transformers as in ours."""

import json
import os

import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
pytest.importorskip('torch')
pytest.importorskip('transformers', minversion='5.23')  # see test_parity.py

import jax
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

import moe_jax
from experiments.parity import hf_models
from moe_jax.devices import partitioning
from moe_jax.interop import huggingface
from tests.data import rendered_chats

hf_models.one_thread()
BOS, EOS, (TEMPLATE, TOKENS) = (
  rendered_chats.BOS,
  rendered_chats.EOS,
  rendered_chats.TEMPLATES['tokens'],
)


def make(directory):
  """DeepSeek-V2 with a tokenizer of letters, and a second token that ends a text."""
  hf_models.make('v2_no_yarn', directory)
  vocab = {token: i for i, token in enumerate((BOS, EOS, *TOKENS, *'abcdefghijklmnopqrstuvwxyz'))}
  letters = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  letters.pre_tokenizer = pre_tokenizers.Split(' ', 'removed')
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=letters,
    bos_token=BOS,
    eos_token=EOS,
    additional_special_tokens=list(TOKENS),
    chat_template=TEMPLATE,
  )
  fast.save_pretrained(directory)
  (directory / 'generation_config.json').write_text(json.dumps({'eos_token_id': [1, vocab['z']]}))


@pytest.mark.slow
def test_a_tuned_checkpoint_answers_alike(tmp_path, monkeypatch):
  mesh = partitioning.make_mesh
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg: mesh(cfg, jax.devices()[:1]))
  make(tmp_path / 'in')
  rows = [{'prompt': f'say {c}', 'completion': c * 3} for c in 'abcdefgh' for _ in range(8)]
  (tmp_path / 'chats.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  given = {
    'init_from': str(tmp_path / 'in'),
    'data.source': 'conversations',
    'data.path': str(tmp_path / 'chats.jsonl'),
    'data.cache_dir': str(tmp_path / 'cache'),
    'data.heldout_fraction': 0.3,
    'optim.warmup_steps': 0,
    'train.num_steps': 4,
    'train.batch_size': 2,
    'train.eval_every': 0,
  }
  tuned = moe_jax.train('sft', tmp_path / 'run', report=False, **given)
  huggingface.export_checkpoint(tmp_path / 'run', tmp_path / 'out')

  reference = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert reference.chat_template == TEMPLATE
  theirs = hf_models.load_theirs('v2_no_yarn', tmp_path / 'out')
  written = []
  for question in ('say a', 'say h', 'what'):
    chat = [{'role': 'user', 'content': question}]
    ids = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tuned.encode_chats([chat]) == [ids]
    with torch.no_grad():
      found = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    want = reference.decode(found[0, len(ids) :], skip_special_tokens=True)
    # A tokenizer without a decoder has a space between any two tokens, and so before the first.
    assert tuned.chat(chat, 8, temperature=0).removeprefix(' ') == want.removeprefix(' ')
    written.append(want)
  assert any(written)
