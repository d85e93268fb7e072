import numpy as np

from configs import base
from experiments import show_data
from moe_jax.data import tokenizer as tokenizer_lib


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
