"""All parts on a tiny MoE model, and what the report makes of them."""

import json
import types

import numpy as np
import pytest

from experiments.anchors import claims, report, tables
from moe_jax import errors
from moe_jax.analysis.anchors import confusion, correlation, measure, prompts, tasks
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tasks import episodes
from tests import tiny

SETTINGS = measure.Settings(sets=2, queries=4, size=8, random_draws=2)


def subject(moe=True, **overrides):
  dense = {} if moe else {'model__moe__num_experts': 0, 'model__num_dense_layers': 0}
  cfg = tiny.make(
    model__num_layers=2,
    model__max_seq_len=160,
    model__vocab_size=320,
    **dense,
    **overrides,
  ).model
  variables = {'params': tiny.params(cfg), 'router_state': tiny.router_state(cfg) if moe else {}}
  return measure.Subject(cfg, variables, tokenizer_lib.byte_tokenizer('<b>', '<e>'))


def task(**sizes):
  """Episodes whose label words begin with different bytes."""
  found = tasks.of(
    'episodes', '', (episodes.Task(classes=2, queries=1, words=1)._replace(**sizes), 0)
  )

  def draw(number, more, queries):
    one = found.draw(number, more, queries)
    return one._replace(labels=('a', 'b'))

  return found._replace(draw=draw, template=found.template._replace(label_space=''))


@pytest.mark.slow
def test_every_part_and_the_report(tmp_path):
  prepared = measure.prepare(subject(), task(), SETTINGS)
  found = measure.run(prepared)
  assert list(found) == ['accuracy', 'chance', *measure.PARTS]
  record = {'step': 1, 'task': 'episodes', 'settings': SETTINGS._asdict()} | found
  record = json.loads(json.dumps(record))
  np.testing.assert_allclose(record['compression']['arms']['everything']['label_loyalty'], 1.0)
  written = report.write(record, tmp_path)
  html = (tmp_path / 'report.html').read_text()
  assert html.count('data:image/png;base64,') == len(measure.PARTS)
  assert {path.name for path in written} >= {'flow.png', 'experts.png', 'report.md'}
  lines = '\n'.join(report.lines(record))
  assert all(one.text in lines for one in claims.CLAIMS.values())
  # Two runs of a study that learned, of which one figure differs.
  record['accuracy'] = [1.0, 1.0]
  both = ('accuracy', 'chance', 'task', *tables.HARDER_PARTS)
  record['harder'] = {name: record[name] for name in both}
  other = json.loads(json.dumps(record))
  other['blocking']['first/1/label']['label_loyalty'] = [0.0, 0.0]
  table = tables.write(['fine'], {('fine', 0): record, ('fine', 1): other})
  assert table.count('\n') > len(claims.CLAIMS)
  merged = tables.merged([record, other])
  mine = np.mean(record['blocking']['first/1/label']['label_loyalty'])
  assert merged['blocking']['first/1/label']['label_loyalty'] == [pytest.approx(mine), 0.0]


def drawn(labels, answers):
  """Two sets of two queries each, of which a model has predicted `labels`; no model is asked."""
  rng = np.random.default_rng(0)
  whole = types.SimpleNamespace(
    label=np.array(labels), log_probs=np.log(rng.dirichlet([1, 1, 1], size=4))
  )
  return measure.Prepared(
    types.SimpleNamespace(cfg=types.SimpleNamespace(num_layers=2), variables={}),
    None,
    measure.Settings(sets=2, queries=2),
    (types.SimpleNamespace(classes=('x', 'y', 'z')),) * 2,
    types.SimpleNamespace(answer=np.array(answers)),
    whole,
  )


@pytest.mark.filterwarnings('error')
def test_what_is_not_defined_is_null_and_said_so(monkeypatch, tmp_path):
  rng = np.random.default_rng(1)
  scores = rng.dirichlet([1, 1, 1], size=(2, 4))
  monkeypatch.setattr(measure.correlation, 'scores', lambda *_, **__: scores)
  states = confusion.States(rng.normal(size=(4, 8)), rng.normal(size=(4, 3, 8)))
  monkeypatch.setattr(measure.confusion, 'states', lambda *_, **__: states)
  told = drawn([0, 1, 2, 1], [0, 1, 2, 0])
  found = measure.correlation_part(told, resamples=3)
  auc = [correlation.multiclass_auc(one, told.whole.label) for one in scores]
  assert found['auc'] == auc and None not in found['cumulative']
  one = drawn([1, 1, 1, 1], [0, 1, 1, 0])  # one label is predicted, and class z never asked about
  found = measure.correlation_part(one, resamples=3)
  assert found == dict.fromkeys(('auc', 'low', 'high', 'cumulative'), [None, None])
  record = {
    'step': 1,
    'task': 't',
    'settings': {'sets': 2, 'queries': 2},
    'accuracy': [0.5, 0.5],
    'chance': 1 / 3,
    'correlation': found,
    'confusion': measure.confusion_part(one),
  }
  pairs = {(a, b): tuple(rest) for a, b, _, *rest in record['confusion']['pairs']}
  assert pairs['x', 'z'] == (None, 2) and pairs['y', 'z'] == (None, 2)
  first = one.whole.log_probs[:, 0] - one.whole.log_probs[:, 1]
  assert pairs['x', 'y'] == (correlation.auc(first[[0, 3]], first[[1, 2]]), 4)
  record = json.loads(json.dumps(record, allow_nan=False))
  _, of_auc, of_pairs = report.lines(record)
  assert of_auc == 'The model predicts one label only, so that AUCROC is undefined.'
  assert 'over 1 pairs is undefined: it needs three' in of_pairs
  assert of_pairs.endswith('The AUC of 2 pairs is undefined: no query was of one of the classes.')
  report.write(record, tmp_path)
  assert (tmp_path / 'correlation.png').exists() and (tmp_path / 'confusion.png').exists()


def test_prompts_of_all_sets_and_what_is_too_long():
  small = subject(moe=False)
  found = [task().draw(i, 4, 3) for i in range(2)]
  batch = measure.joined(small, task(), found)
  assert batch.tokens.shape[0] == 6 and batch.tokens.shape[1] % 8 == 0
  assert (batch.places.shape, batch.label_ids.shape) == ((6, 2), (6, 2))
  assert batch.answer.tolist() == [e.label for one in found for e in one.queries]
  long = [task(words=4).draw(0, 4, 1)]
  with pytest.raises(errors.InputError, match=r'has \d+ tokens, and the model reads .*_len=160'):
    measure.joined(small, task(), long, lambda one: [*one.demonstrations, *one.more])


def test_blocked_layers():
  assert measure.blocked_counts(6) == (1, 2, 3) and measure.blocked_counts(2) == (1,)
  assert measure.blocked_counts(48) == (1, 3, 5, 7)
  assert prompts.KINDS[prompts.LABEL] == 'label'
