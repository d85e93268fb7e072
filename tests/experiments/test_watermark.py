"""The commands on a model of random weights, and the study's figures on made-up results."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from experiments.watermark import __main__ as command
from experiments.watermark import arms, report, study
from moe_jax import errors
from moe_jax.api import load
from moe_jax.api import run as run_lib
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.runs import trained_run
from moe_jax.watermark import partition
from tests import in_process, tiny

V = 272


@pytest.fixture(scope='module')
def run():
  cfg = tiny.make(
    model__num_layers=1,
    model__moe__num_experts=0,
    model__moe__num_shared_experts=0,
    model__vocab_size=V,
    model__max_seq_len=64,
  )
  mesh = partitioning.make_mesh(cfg.mesh, jax.devices()[:1])
  tokenizer = tokenizer_lib.byte_tokenizer('<bos>', '<eos>')
  variables = {'params': jax.tree.map(lambda a: a * 0.3, tiny.params(cfg.model))}
  return run_lib.Run(trained_run.Run(cfg, mesh, variables, tokenizer, 0, ''), 'W')


@pytest.fixture
def do(run, monkeypatch, capsys, tmp_path):
  """Calls an action with a run in the place of what --workdir and --proxy name."""
  monkeypatch.setattr(load, 'load', lambda directory, flag: run)
  monkeypatch.chdir(tmp_path)

  class Action:
    __name__ = 'watermark'
    define_flags = staticmethod(command.define_flags)

    def main(self, argv):
      return command.main(argv, self.action)

  def call(action, *arguments):
    capsys.readouterr()
    one = Action()
    one.action = action
    in_process.run(one, *arguments)
    return capsys.readouterr().out

  return call


KEY = ('--key=key.json', '--proxy=P')
SMALL = ('--message_bits=16', '--chunk_bits=8', '--tokens_per_bit=2.5', '--secret=5')


def test_a_number_and_a_text_are_written_attacked_and_read(do):
  assert 'balance, 16 bits in 50 tokens' in do('key', *KEY, *SMALL)
  write = ('--workdir=W', '--prompt=ab', '--prompt=c', '--message=513', '--text=hi', '--delta=30')
  assert '2 texts, 100 tokens' in do('encode', *KEY, *write, '--out=t.json')
  lines = do('decode', *KEY, '--texts=t.json', '--threshold=0').splitlines()
  said = [json.loads(line) for line in lines]
  assert [one['message'] for one in said] == [513, int.from_bytes(b'hi', 'big')]
  assert all(len(one['chunks']) == 2 and one['confidence'] > 0.9 for one in said)
  lines = do('decode', *KEY, '--texts=t.json', '--threshold=0', '--as_text').splitlines()
  assert json.loads(lines[1])['message'] == 'hi'
  cut = ('attack', '--workdir=W', '--texts=t.json', '--out=cut.json')
  do(*cut, '--attack=cut', '--share=0.3')
  (said, _) = map(json.loads, do('decode', *KEY, '--texts=cut.json', '--threshold=0').splitlines())
  assert said['message'] is None and len(said['chunks']) == 1  # one of two chunks is left
  do(*cut, '--attack=substitute', '--share=0.2')
  before, after = (
    json.loads(pathlib.Path(name).read_text())[0]['ids'] for name in ('t.json', 'cut.json')
  )
  assert 0 < np.sum(np.array(before) != after) <= 10
  pathlib.Path('host.txt').write_text('\ufeff' + 'x' * 100)
  do(*cut, '--attack=paste', '--file=host.txt')
  (said, _) = map(json.loads, do('decode', *KEY, '--texts=cut.json', '--scan').splitlines())
  assert len(json.loads(pathlib.Path('cut.json').read_text())[0]['ids']) == 150 and len(said) <= 1


def test_a_message_has_no_more_bits_than_its_key_says(do):
  few = ('--message_bits=8', '--chunk_bits=20', '--tokens_per_bit=2', '--secret=5')
  assert '8 bits in 50 tokens' in do('key', *KEY, *few)
  pathlib.Path('plain.txt').write_text('No message stands in this text, which anyone may have.' * 2)
  read = ('decode', *KEY, '--file=plain.txt', '--threshold=0')
  said = json.loads(do(*read))
  assert 0 <= said['message'] < 2**8
  assert json.loads(do(*read, '--as_text'))['message'] is not None


def test_a_key_that_is_refused_leaves_no_file(do):
  for rate in ('inf', 'nan', '1e308'):
    with pytest.raises(errors.InputError, match='tokens_per_bit=.* must be finite'):
      do('key', *KEY, f'--tokens_per_bit={rate}')
    assert not pathlib.Path('key.json').exists()


def test_bad_input_is_one_error(do, run, monkeypatch):
  do('key', *KEY, *SMALL)
  write = ('encode', *KEY, '--workdir=W', '--prompt=ab', '--out=t.json')
  for arguments, words in (
    ((*write, '--message=65536'), r'below 2\^16: message_bits=16'),
    ((*write, '--text=abc'), r"--text='abc' has 3 bytes, but message_bits=16 of the key hold 2"),
    ((*write, '--message=1', '--message=2'), 'are given 2 times for 1 --prompt'),
    ((*write, '--message=1', '--max_new_tokens=49'), 'needs 50 tokens'),
    ((*write, '--message=1', '--delta=-1'), '--delta=-1.0 must be at least 0'),
    (('decode', *KEY, '--texts=none.json'), '--texts=.*none.json cannot be read'),
    (('decode', *KEY, '--texts=key.json'), 'is no list of objects'),
    (('decode', '--key=key.json', '--proxy=P', '--file=key.txt'), '--file=.*key.txt cannot be'),
    (('key', *KEY), 'is there already'),
    (('key', '--key=b.json', '--kind=vanilla', '--proxy=P'), "a 'vanilla' watermark has no proxy"),
  ):
    with pytest.raises(errors.InputError, match=words):
      do(*arguments)
  pathlib.Path('short.txt').write_text('too short')
  with pytest.raises(errors.InputError, match='a chunk of 8 bits takes 10 \\+ 20'):
    do('decode', *KEY, '--file=short.txt')
  other = tokenizer_lib.byte_tokenizer('<s>', '</s>')
  monkeypatch.setattr(run, 'tokenizer', other)
  with pytest.raises(errors.InputError, match='made for another tokenizer'):
    do('decode', *KEY, '--file=short.txt')


def made_up(success: dict[str, float], loss: dict[str, float], texts: int = 20):
  """Results of two seeds: of each arm, that share of messages right and that loss."""
  found = {}
  for arm in arms.ARMS:
    right = round(success.get(arm.name, 0.5) * texts)
    found[arm.name] = {
      'right': [[True, i < right] for i in range(texts)],
      'loss': [4.0 + loss.get(arm.name, 0.0)] * texts,
      'entropy': [3.0, 2.0] * (texts // 2),
    }
  found['unmarked'] = {'loss': [4.0] * texts, 'entropy': [3.0] * texts}
  names = ('none', '5 % substituted')
  attacked = {
    'right': {name: found[arms.SWEEP[0].name]['right'] for name in names},
    'replaced': {'0.3': 0.25},
    'scan': [{'exact': True, 'found': 1}] * texts,
    'other_ids': 0.9,
    'wrong_key_p_values': [[1.0, 0.03]] * texts,
  }
  windows = [[1.0, 25, 50]] * 99 + [[0.005, 40, 50]]
  one = {
    'texts': found,
    'attacks': {kind: attacked for kind in partition.KINDS},
    'windows': {kind: windows for kind in partition.KINDS},
  }
  return {0: one, 1: one}


def test_equal_loss_lies_on_straight_lines_between_deltas():
  # Balance costs 0.01 nats per delta and vanilla twice that; both are right in delta / 4 of cases.
  swept = {arm.name: arm for arm in arms.SWEEP}
  cost = {'balance': 0.01, 'vanilla': 0.02}
  results = made_up(
    {name: arm.delta / 4 for name, arm in swept.items()},
    {name: arm.delta * cost[arm.kind] for name, arm in swept.items()},
  )
  # A rise of 0.02 is delta 2 and 1, and half and a quarter of the messages.
  assert report.at_rise(results, 'balance', 0.02) == pytest.approx([50.0, 50.0])
  assert report.at_rise(results, 'vanilla', 0.02) == pytest.approx([25.0, 25.0])
  assert report.at_rise(results, 'vanilla', 0.05) == pytest.approx([62.5, 62.5])
  assert report.at_rise(results, 'balance', 0.05) is None
  table = report.equal_table(results).splitlines()
  assert table[4] == '| 0.02 | 50.0 | 25.0 | +25.0 [+25.0, +25.0] | confirmed |'
  assert table[5].startswith('| 0.05 | no delta of the sweep costs so much')


def test_tables_count_all_seeds(tmp_path):
  results = made_up({}, {arms.SWEEP[0].name: 0.1})
  row = report.sweep_table(results).splitlines()[4]
  assert row.startswith('| 0.5 | balance | 50.0 [35.2, 64.8] | 75.0 [')
  assert f'| {math.exp(4.1):.1f} | +0.100 [+0.100, +0.100] |' in row
  windows = report.windows_table(results).splitlines()
  assert windows[4].startswith(
    '| balance | 100 windows of 50 tokens, 2 keys | 1.00 [0.27, 3.57] | 1.00 ['
  )
  assert windows[4].endswith('| 0.00 [0.00, 1.88] |')
  assert windows[6].startswith('| balance | 80 marked chunks, another key | 50.00 [')
  report.write(tmp_path / 'out', {}, results, {'write, balance': 0.25})
  text = (tmp_path / 'out/README.md').read_text()
  assert '| write, balance | 0.250 |' in text and 'pasted into 300 tokens' in text
  assert (tmp_path / 'out/curves.png').exists()
  saved = json.loads((tmp_path / 'out/summary.json').read_text())['seeds']['1']
  assert saved[arms.SWEEP[0].name] == {
    'loss': pytest.approx(4.1), 'entropy': 2.5, 'texts': 20, 'messages': 10, 'chunks': 30
  }  # fmt: skip


def test_arms_have_names_of_their_own_and_fit_the_text():
  names = {arm.name for arm in arms.ARMS}
  assert len(names) == len(arms.ARMS) and names.isdisjoint({'unmarked'})
  assert max(arm.scheme(0).num_tokens for arm in arms.ARMS) <= arms.NEW_TOKENS
  balance, vanilla = (
    [arm._replace(kind='') for arm in arms.ARMS if arm.kind == kind] for kind in partition.KINDS
  )
  assert balance == vanilla  # in pairs


def test_a_kept_result_of_other_settings_is_refused(tmp_path):
  path = tmp_path / '0' / 'texts.json'
  calls = []

  def work(models, seed, directory):
    calls.append(seed)
    return {'a': 1}

  for _ in range(2):
    assert study._kept(path, {'prompts': 2, 'arms': [(1, 2)]}, work, None, 7) == {'a': 1}
  assert calls == [7]
  with pytest.raises(errors.InputError, match='is of other settings: .*another --workdir'):
    study._kept(path, {'prompts': 3, 'arms': [(1, 2)]}, work, None, 7)
  assert study.secret(0) != study.secret(1) != study.secret(1, 1)


@pytest.fixture
def studied(run, monkeypatch, tmp_path):
  """The study with works that note their names; `given` has what `_load` gives."""
  given = {
    'writer': run,
    'judge': run,
    'small': run,
    'known': None,
    'prompts': {},
    'unmarked': np.zeros(600, int),
  }
  done = []
  monkeypatch.setattr(study, '_load', lambda: study.Models(**given))
  monkeypatch.setattr(report, 'write', lambda *_: None)
  for name in ('_texts', '_attacks', '_windows', '_times'):
    monkeypatch.setattr(study, name, lambda *_, name=name: done.append(name))

  class Study:
    __name__ = 'watermark'
    define_flags = staticmethod(command.define_flags)
    main = staticmethod(study.main)

  def call(*arguments):
    in_process.run(Study, f'--workdir={tmp_path}/runs', f'--out={tmp_path}/out', *arguments)

  return call, given, done


def of_other_weights(run):
  params = jax.tree.map(lambda a: a + 1, run.variables['params'])
  trained = dataclasses.replace(run.trained, variables={'params': params})
  return run_lib.Run(trained, 'W')


@pytest.mark.parametrize('name, field', [('small', 'proxy'), ('writer', 'runs'), ('judge', 'runs')])
def test_results_of_another_run_are_refused(studied, run, name, field):
  call, given, done = studied
  for _ in range(2):
    call('--seeds=1', '--windows=5')
  assert done == ['_texts', '_attacks', '_windows', '_times']  # the second time nothing
  given[name] = of_other_weights(run)
  with pytest.raises(errors.InputError, match=f'is of other settings: {field}=.*another --workdir'):
    call('--seeds=1', '--windows=5')


def test_windows_that_cannot_be_read_are_refused_before_anything_is_written(studied):
  call, given, done = studied
  # A window takes 50 tokens, and 10 stand before the first one: 600 hold 11 for every seed.
  for flags, words in (
    (('--windows=0',), '--windows=0 must be at least 1 for each of 5 seeds'),
    (('--windows=4',), '--windows=4 must be at least 1 for each of 5 seeds'),
    (('--windows=60',), '--windows=60 needs 610 held-out tokens per seed, and there are 600'),
  ):
    with pytest.raises(errors.InputError, match=words):
      call(*flags)
  given['unmarked'] = np.zeros(300, int)
  with pytest.raises(errors.InputError, match='has 300 tokens, and must have more than 300'):
    call('--windows=5')
  assert not done
  given['unmarked'] = np.zeros(600, int)
  call('--windows=55')
  assert done.count('_windows') == 5
