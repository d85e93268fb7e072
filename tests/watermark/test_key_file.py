import dataclasses
import json

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.watermark import key_file, partition

KEY = key_file.Key(partition.Scheme('balance', 2**63 + 5, message_bits=40), 't' * 64, 32, 'p' * 64)


def test_a_key_comes_back_and_names_its_hash(tmp_path):
  path = tmp_path / 'new' / 'key.json'
  key_file.write(path, KEY)
  assert key_file.read(path) == KEY
  assert json.loads(path.read_text())['mixing'] == 'murmur3-fmix32-combine/1'
  with pytest.raises(errors.InputError, match='is there already'):
    key_file.write(path, KEY)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'mixing': 'other/2'}, "is of the hash 'other/2', and this version has 'murmur3"),
    ({'scheme': {'kind': 'balance'}}, 'is no readable key'),
    ({'extra': 1}, 'is no readable key'),
  ],
)
def test_damaged_keys(tmp_path, change, words):
  key_file.write(tmp_path / 'key.json', KEY)
  fields = json.loads((tmp_path / 'key.json').read_text())
  (tmp_path / 'key.json').write_text(json.dumps(fields | change))
  with pytest.raises(errors.InputError, match=words):
    key_file.read(tmp_path / 'key.json')


def test_missing_and_unreadable_keys(tmp_path):
  (tmp_path / 'list.json').write_text('[1]')
  (tmp_path / 'text.json').write_text('{')
  for name in ('none', 'list', 'text'):
    with pytest.raises(errors.InputError, match='experiments.watermark key'):
      key_file.read(tmp_path / f'{name}.json')


def test_another_tokenizer_or_proxy_is_named():
  key_file.check(KEY, KEY.tokenizer, 32, KEY.proxy)
  for tokenizer, size in (('u' * 64, 32), (KEY.tokenizer, 33)):
    with pytest.raises(errors.InputError, match='made for another tokenizer'):
      key_file.check(KEY, tokenizer, size, KEY.proxy)
  with pytest.raises(errors.InputError, match='the proxy pppppppppppp, and --proxy is not given'):
    key_file.check(KEY, KEY.tokenizer, 32, '')
  vanilla = dataclasses.replace(KEY, proxy='')
  with pytest.raises(errors.InputError, match='for no proxy, and --proxy is pppp'):
    key_file.check(vanilla, KEY.tokenizer, 32, KEY.proxy)


def test_digests_see_values_names_and_shapes():
  weights = {'a': np.arange(4.0, dtype=np.float32)}
  others = [{'b': weights['a']}, {'a': weights['a'] + 1}, {'a': weights['a'].reshape(2, 2)}]
  digests = {key_file.digest(tree) for tree in [weights, *others]}
  assert len(digests) == 4 and key_file.digest({'a': weights['a'].copy()}) in digests
