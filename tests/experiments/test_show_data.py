import numpy as np
import pytest

from configs import base
from experiments import show_data
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import tokenizer as tokenizer_lib
from tests import in_process


def test_what_is_only_read_stands_in_brackets():
  tokens = base.get_config().data
  tokenizer = tokenizer_lib.byte_tokenizer(tokens.bos_token, tokens.eos_token)
  q, a, c, d = (tokenizer.encode(letter)[0] for letter in 'qacd')
  eos = tokenizer.eos_id
  row = {
    'tokens': np.array([q, q, a, a, c, 0]),
    'targets': np.array([-1, a, a, eos, d, -1]),
    'segment_ids': np.array([1, 1, 1, 1, 2, 0]),
  }
  text = show_data.render(row, tokenizer, grey=False)
  assert text == f'[qq]aa{tokens.eos_token}\n[c]d'
  grey = show_data.render(row, tokenizer, grey=True)
  assert grey.startswith(f'{show_data.GREY}qq{show_data.PLAIN}aa')
  assert show_data.describe(row) == '2 documents, 5 of 6 tokens, 4 learned'


@pytest.mark.parametrize('kind, words', show_data.ELSEWHERE.items())
def test_an_objective_that_learns_from_no_rows(kind, words):
  page = ('--config=sft', '--config.objective.inherit=False', '--config.init_from=start')
  labels = '--config.objective.process_reward.labels=labels.jsonl'
  form = ('--config.data.chat_format=marks', '--config.data.tokenizer=bytes')
  kinds = (f'--config.objective.kind={kind}', '--config.data.source=arithmetic')
  with pytest.raises(errors.InputError, match=f'kind={kind!r} learns from {words}, not from rows'):
    in_process.run(show_data, *page, *kinds, *form, labels)
  assert kind in schema.OBJECTIVES
