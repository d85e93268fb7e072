import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis.anchors import prompts
from moe_jax.data import tokenizer as tokenizer_lib
from tests.analysis.anchors import batches

TEMPLATE = 'Review: {text}\nSentiment: {label}\n'
TOKENIZER = tokenizer_lib.byte_tokenizer('<b>', '<e>')


def test_pieces_and_places():
  """By the text that the tokens of each kind spell."""
  form = prompts.parse(TEMPLATE, 'x')
  assert form == prompts.Template('Review:', ' ', '\nSentiment:', ' ', '\n')
  encoder = prompts.Encoder(TOKENIZER, form._replace(label_space=''), ['good', 'bad'], 'x')
  examples = [prompts.Example('so-so', 1), prompts.Example('fine', 0)]
  found = encoder.prompt(examples, prompts.Example('new', 1))
  want = 'Review: so-so\nSentiment:bad\nReview: fine\nSentiment:good\nReview: new\nSentiment:'
  assert TOKENIZER.decode(found.ids.tolist()) == want
  assert found.ids[0] == TOKENIZER.bos_id and found.kinds[0] == prompts.FORMAT

  def spelled(kind):
    return TOKENIZER.decode(found.ids[1:][found.kinds[1:] == kind].tolist())

  assert spelled(prompts.LABEL) == 'badgood' and spelled(prompts.TEXT) == ' so-so fine new'
  assert TOKENIZER.decode(found.ids[found.places - 1].tolist()) == 'ao'  # the last byte of each
  assert found.classes.tolist() == [1, 0] and found.answer == 1
  assert TOKENIZER.decode(found.ids[found.start :].tolist()) == 'Review: new\nSentiment:'


def test_an_end_token_may_follow():
  form = prompts.parse('>{text}={label}', 'x', end=True)
  encoder = prompts.Encoder(TOKENIZER, form, ['a', 'b'], 'x')
  found = encoder.prompt([prompts.Example('t', 0)], prompts.Example('t', 0))
  assert found.ids[found.places[0] + 1] == TOKENIZER.eos_id
  assert encoder.label_ids.tolist() == [TOKENIZER.encode(word)[0] for word in 'ab']


@pytest.mark.parametrize(
  'template, problem',
  [
    ('Review: {text}\n', r'must have \{label\} once, and has it 0 times'),
    ('{text} {text} is {label}', r'must have \{text\} once, and has it 2 times'),
    ('{label}: {text}', r'must have \{label\} behind \{text\}'),
    ('{text} {label}', r'must have words between'),
  ],
)
def test_bad_templates(template, problem):
  with pytest.raises(errors.InputError, match=f'template=.*{problem}'):
    prompts.parse(template, 'template')


def test_label_words_that_begin_alike():
  form = prompts.parse('{text}: {label}', 'x')  # with bytes both begin with the space
  with pytest.raises(errors.InputError, match="'good' and 'bad' must differ in their first token"):
    prompts.Encoder(TOKENIZER, form, ['good', 'bad'], 'x')


def test_stack_and_take():
  batch = batches.batch(rows=3)
  assert batch.tokens.shape == (3, 24) and batch.target.tolist() == [22, 21, 22]
  assert (batch.mask.sum(axis=1) == batch.target + 1).all()
  assert (batch.kinds[~batch.mask] == -1).all() and not batch.tokens[~batch.mask].any()
  part = batch.take(slice(1, 3))
  np.testing.assert_array_equal(part.places, batch.places[1:])
