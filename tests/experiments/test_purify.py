"""The actions on tiny runs, the clean tuning of the study, and its tables on made-up results."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import purify
from experiments.purify import __main__ as command
from experiments.purify import commands, measures, report, study
from moe_jax import errors
from moe_jax.analysis.purification import attacks
from moe_jax.api import load
from moe_jax.checkpoints import stream_writer
from moe_jax.config import parse
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.interop import source
from moe_jax.runs import first_state, run_record, trained_run
from moe_jax.training import lora, value_head
from tests import in_process, tiny

TOKENIZER = tokenizer_lib.byte_tokenizer('<bos>', '<eos>')
EXAMPLES = [attacks.Example(f'x = {i}', 'code') for i in range(3)] + [
  attacks.Example(f'All of {i}.', 'prose') for i in range(3)
]


def run_of(seed=0, **more):
  cfg = tiny.make(
    model__vocab_size=272,
    model__max_seq_len=32,
    data__chat_format='marks',
    data__tokenizer='bytes',
    data__bos_token='<bos>',
    data__eos_token='<eos>',
    **more,
  )
  variables = {
    'params': tiny.params(cfg.model, seed),
    'router_state': tiny.router_state(cfg.model),
  }
  return trained_run.Run(cfg, tiny.mesh(1), variables, TOKENIZER, 7, '')


def do(action, *arguments):
  class Action:
    __name__ = 'purify'
    define_flags = staticmethod(command.define_flags)

    @staticmethod
    def main(argv):
      return command.main(argv, action)

  return in_process.run(Action, *arguments)


@pytest.fixture
def place(monkeypatch, tmp_path):
  """A directory with examples, in which base and tuned stand for runs; what `write` is given."""
  found = {'base': run_of(0), 'tuned': run_of(1)}
  monkeypatch.setattr(load, 'read', lambda directory, flag: found[pathlib.Path(directory).name])
  written = {}

  def write(workdir, tuned, params, out):
    written['params'] = params

  monkeypatch.setattr(commands, 'write', write)
  (tmp_path / 'clean.jsonl').write_text(attacks.to_jsonl(EXAMPLES))
  monkeypatch.chdir(tmp_path)
  return found, written


FLAGS = ('--base=base', '--workdir=tuned', '--examples=clean.jsonl', '--out=new')


def leaves(tree):
  return [np.asarray(a) for a in jax.tree.leaves(tree)]


@pytest.mark.parametrize('method', purify.METHODS)
def test_reset_puts_back_by_the_reserve(place, capsys, method):
  found, written = place
  do('reset', *FLAGS, f'--method={method}', '--reserve=0.5')
  old, new = (leaves(found[name].variables['params']) for name in ('base', 'tuned'))
  after = leaves(written['params'])
  changed = sum(int((a != b).sum()) for a, b in zip(after, new))
  total = sum(a.size for a in new)
  if method == 'pruning':
    assert all(((a == b) | (a == 0)).all() for a, b in zip(after, new)) and changed
    return
  assert all(((a == b) | (a == c)).all() for a, b, c in zip(after, new, old))
  if method == 'purify':
    out = capsys.readouterr().out
    assert 'ranked weights put back' in out and 'experts seen by the clean examples' in out
  assert 0.4 < changed / total < 0.51


def test_score_counts_both_sets(place, capsys):
  pathlib.Path('attacked.jsonl').write_text(attacks.to_jsonl(EXAMPLES[:3]))
  do('score', '--workdir=tuned', '--examples=clean.jsonl', '--attacked=attacked.jsonl')
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith('clean accuracy: ') and said[0].endswith(' of 6')
  assert said[1].startswith('attack success: ') and said[1].endswith(' of 3')


def saved(workdir, run, added):
  """A run on the disk of which the last checkpoint is left; `added` is no weight of the model."""
  meta = {
    'config': parse.to_dict(run.cfg),
    'tokenizer': trained_run.digest(TOKENIZER),
    'data_fingerprint': 'text',
  }
  params = run.variables['params'] | added
  state = jax.device_get({**run.variables, 'params': params})
  with stream_writer.Writer(workdir / 'checkpoints', run.step, state, meta) as writer:
    for name, leaf in source.by_name(state).items():
      writer.write(name, (), leaf)
  TOKENIZER.save(workdir / 'tokenizer.json')
  run_record.write(workdir, run.cfg, argv=[], data_fingerprint='text')


TUNED = {'init_from': 'base', 'model__moe__balance__expert_level__weight': 0.0}
PPO = {'objective__kind': 'policy', 'objective__policy__algorithm': 'ppo'}
HEAD = {'kernel': np.ones((16, 1), np.float32), 'bias': np.ones(1, np.float32)}


@pytest.mark.parametrize(
  'changes',
  [
    {'trainable__kind': 'lora'},
    PPO | {'objective__policy__max_new_tokens': 8, 'data__source': 'arithmetic'},
  ],
  ids=['lora', 'ppo'],
)
def test_a_reset_run_is_read_scored_and_started_from(tmp_path, monkeypatch, capsys, changes):
  make_mesh, one = partitioning.make_mesh, jax.devices()[:1]
  base, tuned = run_of(0), run_of(1, **TUNED, **changes)
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg, devices=one: make_mesh(cfg, devices))
  monkeypatch.chdir(tmp_path)
  params = dict(tuned.variables['params'])
  begin = functools.partial(lora.started, tuned.cfg, rng=jax.random.key(0))
  pairs = {k: v for k, v in tiny.jit(begin)(params).items() if k not in params}
  pairs = jax.tree.map(lambda a: a + 0.1, pairs)
  head = {value_head.KEY: HEAD} if value_head.is_used(tuned.cfg) else {}
  saved(tmp_path / 'base', base, {})
  saved(tmp_path / 'tuned', tuned, pairs | head)
  for name in ('clean', 'attacked'):
    (tmp_path / f'{name}.jsonl').write_text(attacks.to_jsonl(EXAMPLES))
  do('reset', *FLAGS, '--method=mixing', '--reserve=1')  # all of the tuned run is kept
  found = trained_run.load('new')
  want = tiny.jit(lora.merged)(params | pairs)
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(same, found.variables['params'], want)
  assert found.cfg.trainable.kind == 'all' and not value_head.is_used(found.cfg)
  assert found.cfg.objective.kind == ('sft' if head else 'next_token')
  do('score', '--workdir=new', '--examples=clean.jsonl', '--attacked=attacked.jsonl')
  assert 'clean accuracy: ' in capsys.readouterr().out
  own = run_of(**TUNED | {'init_from': 'new'}).cfg
  started = first_state.of_run(own).read(own, found.mesh, lambda line: None)
  jax.tree.map(same, started['params'], want)


def test_success_and_bias_count_opposite_answers(monkeypatch):
  run = run_of()
  monkeypatch.setattr(
    measures.examples, 'answers', lambda m, v, batch, f: [1] * len(batch['tokens'])
  )
  counts = {
    kind: measures.Meter(run.cfg, TOKENIZER, EXAMPLES, EXAMPLES[:3], kind)(run.variables)
    for kind in ('word', 'bias')
  }
  assert counts == {
    'word': {'clean': (3, 6), 'attack': (3, 3)},
    'bias': {'clean': (3, 6), 'attack': (0, 3)},
  }


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--reserve=1.5',), '--reserve=1.5'),
    (('--ranking=rows',), '--ranking=rows'),
    (('--examples=none.jsonl',), '--examples=none.jsonl'),
    (('--examples=empty.jsonl',), 'holds no clean examples'),
    (('--examples=other.jsonl',), "completion 'x'"),
    (('--method=mixing', '--ranking=layer'), '--ranking=layer has no effect with --method=mixing'),
    (('--method=pruning', '--unseen=rank'), '--unseen=rank has no effect with --method=pruning'),
    (('--seed=3',), '--seed=3 has no effect with --method=purify'),
  ],
)
def test_bad_input_writes_nothing(place, flags, message):
  pathlib.Path('empty.jsonl').write_text('')
  pathlib.Path('other.jsonl').write_text('{"prompt": "a", "completion": "x"}\n')
  with pytest.raises(errors.InputError, match=message):
    do('reset', *FLAGS, *flags)
  assert not place[1]


def test_a_base_that_is_not_there_is_named_by_its_flag(tmp_path):
  with pytest.raises(errors.InputError, match='^--base=.*nope holds no checkpoints'):
    do('data', f'--base={tmp_path}/nope', f'--out={tmp_path}/out')


def test_examples_of_other_editors(tmp_path):
  rows = '\ufeff{"prompt": "a\u2028b", "completion": "code"}\n\n'
  (tmp_path / 'own.jsonl').write_text(rows)
  found = commands.read(str(tmp_path / 'own.jsonl'), '--examples')
  assert found == (attacks.Example('a\u2028b', 'code'),)


def test_a_start_of_another_architecture(place):
  place[0]['base'] = run_of(0, model__moe__moe_mlp_dim=12)
  with pytest.raises(errors.InputError, match='params/moe_layers/moe/down is .* --base'):
    do('reset', *FLAGS)


def test_clean_tuning_learns_and_is_the_same_again(monkeypatch):
  monkeypatch.setattr(study, 'TUNE_STEPS', 6)
  tuned = run_of()
  tuner = study.Tuner(tuned, EXAMPLES, 0)
  start = jax.device_get(tuned.variables['params'])
  one, other = (leaves(tuner(start)['params']) for _ in range(2))
  assert all(np.array_equal(a, b) for a, b in zip(one, other))
  assert any(not np.array_equal(a, b) for a, b in zip(one, leaves(start)))


def made_up(seeds=3):
  def count(right):
    return {'clean': [90, 100], 'attack': [right, 50]}

  found = {}
  for variant in ('fine', 'gshard'):
    for seed in range(seeds):
      attack = {
        'before': count(50),
        'tuned': {'1': count(40), '0': count(1)},
        'purify': {r: {'tuned': count(5 + seed)} for r in ('0.3', '0.9')},
        'mixing': {r: {'tuned': count(15 + seed)} for r in ('0.3', '0.9')},
        'pruning': {r: {'tuned': count(45)} for r in ('0.3', '0.9')},
        'whole': {o: {s: count(30) for s in ('0.25', '1.0')} for o in ('r', 'random')},
        'experts': {'half_of_mass': 0.1, 'half_of_reset': 0.3, 'seen': 60, 'experts': 64},
      }
      control = {'before': count(2), 'experts': attack['experts']}
      found[f'{variant}/{seed}'] = {'attacks': {'none': control, 'word': attack, 'bias': attack}}
  return found


def test_differences_are_paired_and_of_the_trigger():
  records = report.of_variant(made_up(), 'fine')
  found = report.gain(records, 'word', 'mixing', '0.3')
  assert (found.mean, found.low, found.high, found.num_seeds) == (-20.0, -20.0, -20.0, 3)
  assert report.gain(records, 'word', 'tuned', '0.3').mean == pytest.approx(100 * (6 - 40) / 50)
  assert report.gain(records, 'bias', 'mixing', '0.3').mean == 20.0  # less accuracy, more bias


def test_shares_are_over_seeds_and_stay_inside():
  # 40, 60 and 80 % of a seed's texts: 60 +- t(0.975, 2) 20 / sqrt(3) = 60 +- 49.7. Wilson's of 180
  # right among 300 texts would be 54.4 to 65.4, as if a text said nothing of its seed's others.
  assert report.over_seeds([0.4, 0.6, 0.8]) == '60.0 [10.3, 100.0]'
  assert report.over_seeds([0.0, 0.0, 0.1]) == '3.3 [0.0, 17.7]'
  assert report.over_seeds([0.9] * 3) == '90.0 [90.0, 90.0]'


def test_the_report_is_written_around_what_is_there(tmp_path):
  (tmp_path / 'README.md').write_text(f'# Head\n{report.START}\nold\n{report.END}\n# Verdict\n')
  report.write(tmp_path, made_up(), {'poison': 0.2})
  text = (tmp_path / 'README.md').read_text()
  assert text.startswith('# Head') and text.endswith('# Verdict\n') and '\nold\n' not in text
  assert '| purify, tuned | 0.3 | 90.0 [90.0, 90.0] | 12.0 [7.0, 17.0] |' in text
  assert '| fine-grained | none | 10.0 [10.0, 10.0] | 30.0' in text
  assert (tmp_path / 'curves.png').stat().st_size > 10_000
  assert json.loads((tmp_path / 'results.json').read_text())['settings'] == {'poison': 0.2}


def test_results_of_other_settings_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
  monkeypatch.setattr(study, '_one', lambda *_: pytest.fail('nothing is to be trained'))
  place = tmp_path / 'fine' / '0' / 'purify.json'
  place.parent.mkdir(parents=True)
  place.write_text(json.dumps({'settings': {'attacks': ['word']}, 'attacks': {}}))
  flags = (f'--workdir={tmp_path}', '--seeds=1', '--variants=fine', '--attacks=word,bias')
  with pytest.raises(errors.InputError, match='is of other settings: .*another --workdir'):
    do('study', *flags)


@pytest.mark.parametrize(
  'word, words',
  [
    ('--poison=1.5', r'^--poison=1.5 must lie in \[0, 1\]'),
    ('--test=7', '^--test=7 examples must be an even number'),
  ],
)
def test_bad_draws_are_refused_before_anything_is_trained(tmp_path, monkeypatch, word, words):
  monkeypatch.setattr(study, '_one', lambda *_: pytest.fail('nothing is to be trained'))
  lines = {label: [f'{label} {i}' for i in range(600)] for label in ('code', 'prose')}
  monkeypatch.setattr(study, '_lines', lambda: lines)
  with pytest.raises(errors.InputError, match=words):
    do('study', f'--workdir={tmp_path}', '--seeds=1', '--variants=fine', word)
