import json

import numpy as np
import pytest

from configs import dpo
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_formats, corpus, preferences, whole_documents

PAIR = {'prompt': 'What is 2 + 3?', 'chosen': 'It is 5.', 'rejected': 'It is 6!'}
TURNS = [
  {'role': 'user', 'content': 'Hi'},
  {'role': 'assistant', 'content': 'Hello.'},
  {'role': 'user', 'content': 'What is 2 + 3?'},
]


def answer(text, **more):
  return [{'role': 'assistant', 'content': text, **more}]


def test_rows_of_all_forms_are_the_same_pair():
  one = preferences.from_row(PAIR)
  messages = {
    'prompt': [{'role': 'user', 'content': PAIR['prompt']}],
    'chosen': answer(PAIR['chosen']),
    'rejected': answer(PAIR['rejected']),
  }
  whole = {side: messages['prompt'] + messages[side] for side in ('chosen', 'rejected')}
  assert preferences.from_row(messages) == preferences.from_row(whole) == one
  assert preferences.from_bytes(preferences.to_bytes(one)) == one


def test_only_the_last_answer_is_learned():
  pair = preferences.from_row({'prompt': TURNS, 'chosen': '5', 'rejected': '6'})
  for side in pair:
    assert [turn.learned for turn in side] == [False, False, False, True]


@pytest.mark.parametrize(
  ('row', 'words'),
  [
    ({'prompt': 'a', 'chosen': 'b'}, '"prompt", "chosen" and "rejected"; its fields: \'prompt\''),
    ([], 'no object'),
    (PAIR | {'rejected': PAIR['chosen']}, 'nothing can be preferred'),
    (PAIR | {'chosen': 5}, 'texts or lists of messages'),
    (PAIR | {'chosen': []}, 'end with an answer of the assistant in "chosen"'),
    (PAIR | {'chosen': answer('a', mask=1)}, 'end with an answer of the assistant in "chosen"'),
    (
      {'chosen': TURNS + answer('5'), 'rejected': TURNS[2:] + answer('6')},
      'answers to different prompts',
    ),
  ],
)
def test_other_rows_are_refused(row, words):
  with pytest.raises(ValueError, match=words):
    preferences.from_row(row)


def load(tmp_path, rows) -> tuple[schema.DataConfig, corpus.Corpus]:
  (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  values = dpo.get_config().data.to_dict() | {
    'path': str(tmp_path / 'pairs.jsonl'),
    'cache_dir': str(tmp_path / 'cache'),
    'tokenizer': 'bytes',
    'chat_format': 'deepseek_llm',
  }
  data = schema.DataConfig(**values)
  return data, corpus.load_corpus(data, 300, 0, progress=False)


def test_a_pair_is_two_segments_side_by_side(tmp_path):
  """Read from a file, tokenised, cached, packed: what is learned spells the two answers."""
  rows = [
    {'prompt': f'Say {i}.', 'chosen': f'{i}' * (i % 3 + 1), 'rejected': 'no'} for i in range(60)
  ]
  data, found = load(tmp_path, rows)
  split, tokenizer = found.train[0], found.tokenizer
  assert split.num_documents + found.heldout.num_documents == 60
  assert split.doc_bytes.sum() == sum(
    len(r['chosen']) + 2 for r in (rows[n - 1] for n in numbers(split, tokenizer))
  )
  packed = whole_documents.WholeDocuments(split, np.arange(split.num_documents), 128)
  seen = 0
  for i in range(len(packed)):
    row = packed[i]
    assert 'reference' not in row
    for k, document in enumerate(packed.documents(i)):
      asked = numbers(split, tokenizer)[document] - 1
      for half, want in ((1, rows[asked]['chosen']), (2, 'no')):
        here = row['segment_ids'] == 2 * k + half
        learned = row['targets'][here & (row['targets'] >= 0)]
        assert learned[-1] == tokenizer.eos_id
        assert tokenizer.decode(learned[:-1]) == ' ' + want
        assert row['positions'][here].tolist() == list(range(here.sum()))
        asked_before = preferences.from_row(rows[asked]).chosen[:1]
        (prompt,) = chat_formats.prompts(data, [asked_before], tokenizer)
        assert row['tokens'][here][: len(prompt)].tolist() == prompt
      seen += 1
  assert seen == split.num_documents
  # Both answers go into the row, or none: 128 places are enough for one pair of 36 + 31 tokens.
  assert whole_documents.num_rows(split, 40) == 0 and not len(
    whole_documents.WholeDocuments(split, np.arange(split.num_documents), 40)
  )


def numbers(split, tokenizer) -> list[int]:
  """Line numbers of a split's documents, read out of their prompts."""
  texts = [
    tokenizer.decode(split.tokens[slice(*split.offsets[d : d + 2])])
    for d in range(split.num_documents)
  ]
  return [int(text.split('Say ')[1].split('.')[0]) + 1 for text in texts]


def test_a_bad_line_is_named(tmp_path):
  with pytest.raises(errors.InputError, match=r'pairs.jsonl:2 must have "prompt", "chosen"'):
    load(tmp_path, [PAIR, {'prompt': 'a', 'completion': 'b'}])
