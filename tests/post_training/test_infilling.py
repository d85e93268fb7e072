import types

import numpy as np
import pytest

from configs import base
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import generate
from moe_jax.post_training import infilling

TEXT = 'def f(x):\n  return x + 1\n\n' + 'a line that is too long to be chosen\n' + 'y\n'


def data_of(**changes) -> schema.DataConfig:
  values = base.get_config().data.to_dict() | {'source': 'synthetic', 'heldout_fraction': 0.3}
  return schema.DataConfig(**values | changes)


def test_a_gap_is_the_end_of_a_line():
  seen = set()
  for seed in range(60):
    one = infilling.gap(TEXT, np.random.default_rng(seed))
    assert one.prefix + one.middle + one.suffix == TEXT and one.middle
    assert one.suffix[0] == '\n' and one.prefix[-1].strip() + one.middle != ''
    seen.add((one.prefix + one.middle).splitlines()[-1])
  assert seen == {'def f(x):', '  return x + 1'}
  assert infilling.gap('y\n', np.random.default_rng(0)) is None


def test_gaps_are_in_held_out_documents_of_each_domain():
  parts = {
    'functions': schema.MixtureComponent('synthetic', 'code', 1.0),
    'sums': schema.MixtureComponent('synthetic', 'arithmetic', 1.0),
  }
  data = data_of(source='mixture', mixture=parts, synthetic_documents=200)
  found = dict(infilling.gaps(data, 5))
  assert list(found) == ['functions', 'sums'] and {len(one) for one in found.values()} == {5}
  assert found == dict(infilling.gaps(data, 5))
  held_out = {
    document.text.decode()
    for spec in sources.specs(data).values()
    for document in sources.read(spec)
    if sources.is_heldout(document.name, data.heldout_fraction)
  }
  every = [one for ones in found.values() for one in ones]
  assert all(one.prefix + one.middle + one.suffix in held_out for one in every)
  for source in schema.CHAT_SOURCES:
    with pytest.raises(errors.InputError, match='holds conversations, and gaps are made in text'):
      next(infilling.gaps(data_of(source=source), 5))


def test_exact_matches_are_counted():
  """A model that knows every second middle, and is shown what stands next to the gap."""
  tokens = base.get_config().data
  tokenizer = tokenizer_lib.byte_tokenizer(tokens.bos_token, tokens.eos_token)
  found = [infilling.Gap(f'{"p" * 40}{i}', f'{i}{"s" * 40}', f'm{i}') for i in range(70)]
  asked = []

  def complete(prompts, max_new_tokens, sampling):
    assert sampling.temperature == 0
    begin = len(asked)
    asked.extend(prompts)
    texts = [found[i].middle if i % 2 else '' for i in range(begin, len(asked))]
    return generate.Generation([[0]] * len(prompts), texts, 1.0)

  config = types.SimpleNamespace(model=types.SimpleNamespace(max_seq_len=28))
  model = types.SimpleNamespace(config=config, tokenizer=tokenizer, complete=complete)
  assert infilling.measure(model, found) == (35, 70)
  begin, hole, end = tokenizer.fim_ids
  prefix, suffix = tokenizer.encode('p' * 8 + '69'), tokenizer.encode('69' + 's' * 8)
  assert asked[69] == [tokenizer.bos_id, begin, *prefix, hole, *suffix, end]
  assert str(infilling.Filled(35, 70)) == '35 of 70 exact: 50.0% [38.6%, 61.4%]'
  config.model.max_seq_len = 9
  with pytest.raises(errors.InputError, match='too short to fill gaps of 3 tokens'):
    infilling.measure(model, found)


def test_a_perfect_model_fills_every_gap_and_one_that_goes_on_none():
  tokens = base.get_config().data
  tokenizer = tokenizer_lib.byte_tokenizer(tokens.bos_token, tokens.eos_token)
  longest = '"' + 'ä' * (infilling.LONGEST - 3) + '"'
  found = [infilling.Gap('x = ', '\n', middle) for middle in ('0123456789abcdef', longest, '1')]
  config = types.SimpleNamespace(model=types.SimpleNamespace(max_seq_len=256))

  def model(more):
    def complete(prompts, max_new_tokens, sampling):
      ids = [tokenizer.encode(one.middle + more)[:max_new_tokens] for one in found[: len(prompts)]]
      return generate.Generation(ids, [tokenizer.decode(one) for one in ids], 1.0)

    return types.SimpleNamespace(config=config, tokenizer=tokenizer, complete=complete)

  assert infilling.measure(model(''), found) == (3, 3)
  assert infilling.measure(model(' and on' * 20), found) == (0, 3)
  assert infilling.measure(model(''), found[:1]) == (1, 1)
  assert infilling.measure(model(' and on'), found[:1]) == (0, 1)
  # What goes on with tokens that say nothing has not ended either.
  silent, config.model.max_seq_len = tokenizer.fim_ids[0], 64
  endless = types.SimpleNamespace(
    config=config,
    tokenizer=tokenizer,
    complete=lambda prompts, limit, sampling: generate.Generation([[silent] * limit], ['1'], 1.0),
  )
  assert infilling.measure(endless, found[2:]) == (0, 1)
