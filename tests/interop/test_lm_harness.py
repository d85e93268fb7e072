"""lm-evaluation-harness on a tiny model, with tasks defined in local files."""

import json
import os

os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'

import jax
import numpy as np
import pytest

from tests import tiny

pytest.importorskip('lm_eval')

from moe_jax import errors
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.interop import lm_harness
from moe_jax.models import transformer
from moe_jax.runs import trained_run

CFG = tiny.make(model__vocab_size=288, model__max_seq_len=96, model__num_layers=2)
QUESTIONS = [
  {'question': 'a b c', 'choices': [' d', ' eeee', ' f g'], 'label': 0},
  {'question': 'one', 'choices': [' two', ' 2', ' II'], 'label': 1},
  {'question': 'x', 'choices': [' y', ' zz', ' xyz'], 'label': 2},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: PLACE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {data_files: {test: PLACE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLL = """
task: local_roll
dataset_path: json
dataset_kwargs: {data_files: {test: PLACE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope='module')
def loaded():
  mesh = tiny.mesh(data=2)
  tokenizer = tokenizer_lib.byte_tokenizer(CFG.data.bos_token, CFG.data.eos_token)
  whole = jax.NamedSharding(mesh, jax.P())
  variables = jax.device_put({'params': tiny.params(CFG.model), 'router_state': {}}, whole)
  return trained_run.Run(CFG, mesh, variables, tokenizer, 7, 'none')


def logp(loaded, context, target):
  """Sum of log-probabilities of `target` behind BOS and `context`, one row of its own."""
  ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(context + target)]
  at = np.arange(len(ids))[None]
  params = {'params': tiny.params(CFG.model)}
  apply = tiny.jit(transformer.Transformer(CFG.model).apply)
  out = jax.nn.log_softmax(apply(params, np.array([ids]), at, np.ones_like(at)).logits[0])
  first = len(ids) - len(loaded.tokenizer.encode(target))
  return sum(float(out[i - 1, ids[i]]) for i in range(first, len(ids)))


def task(tmp_path, text, rows):
  data = tmp_path / 'data.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'task.yaml').write_text(text.replace('PLACE', str(data)))
  return str(tmp_path)


def test_choices_are_scored_as_the_model_scores_them(loaded, tmp_path):
  place = task(tmp_path, CHOICE, QUESTIONS)
  found = lm_harness.evaluate_tasks(loaded, ['local_choice'], include_path=place, batch_size=4)
  right = 0
  for row in QUESTIONS:
    scores = [logp(loaded, row['question'], choice) for choice in row['choices']]
    right += int(np.argmax(scores)) == row['label']
  assert found['local_choice']['acc,none'] == pytest.approx(right / 3)


def test_likelihoods_and_greedy_marks(loaded):
  harness = lm_harness.Harness(loaded, 3)
  pairs = [(q['question'], c) for q in QUESTIONS for c in q['choices']]
  encode = loaded.tokenizer.encode
  found = harness._loglikelihood_tokens(
    [((a, b), encode(a), encode(b)) for a, b in pairs], disable_tqdm=True
  )
  want = [logp(loaded, *pair) for pair in pairs[:3]]
  # Float32 through two layers, other batch shapes.
  np.testing.assert_allclose([score for score, _ in found[:3]], want, rtol=1e-4)
  greedy = loaded.tokenizer
  prompt = [greedy.bos_id, *encode('a b c')]
  ids = generate.generate(
    CFG.model, loaded.variables, [prompt], 3, (5,), sampling_lib.Sampling(temperature=0.0)
  ).tokens[0]
  (_, sure), (_, other) = harness._loglikelihood_tokens(
    [(('', ''), encode('a b c'), ids), (('', ''), encode('a b c'), [ids[0], (ids[1] + 1) % 288])],
    disable_tqdm=True,
  )
  assert sure and not other


def test_continuations_are_those_of_generate_up_to_the_stop_string(loaded, tmp_path):
  prompt = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode('a b c')]
  greedy = sampling_lib.Sampling(temperature=0.0)
  text = generate.generate(
    CFG.model, loaded.variables, [prompt], 8, loaded.tokenizer.end_ids, greedy,
    decode_text=loaded.tokenizer.decode,
  ).texts[0]  # fmt: skip
  rows = [{'question': 'a b c', 'answer': text}, {'question': 'q', 'answer': 'no such text'}]
  place = task(tmp_path, WRITE, rows)
  found = lm_harness.evaluate_tasks(loaded, ['local_write'], include_path=place, batch_size=2)
  assert found['local_write']['exact_match,none'] == pytest.approx(0.5)


def test_whole_texts_are_scored_in_windows_that_cover_every_byte(loaded, tmp_path):
  text = 'the quick brown fox ' * 8  # 160 bytes, longer than the model's 96 tokens
  place = task(tmp_path, ROLL, [{'text': text}])
  found = lm_harness.evaluate_tasks(loaded, ['local_roll'], include_path=place, batch_size=2)
  value = found['local_roll']['byte_perplexity,none']
  # Two windows: 95 tokens behind the begin token, then 65 behind it and the 30 before them.
  first = logp(loaded, '', text[:95])
  ids = loaded.tokenizer.encode(text)
  at = np.arange(96)[None]
  tail = np.array([[loaded.tokenizer.bos_id, *ids[65:]]])
  logits = tiny.jit(transformer.Transformer(CFG.model).apply)(
    {'params': tiny.params(CFG.model)}, tail, at, np.ones_like(at)
  ).logits[0]
  table = jax.nn.log_softmax(logits)
  second = sum(float(table[i - 1, tail[0, i]]) for i in range(31, 96))
  assert np.log(value) * 160 == pytest.approx(-(first + second), rel=1e-3)


@pytest.mark.parametrize(
  'names, options, message',
  [
    (['no_such_task'], {}, '--tasks=no_such_task is not known'),
    (['x'], {'batch_size': 0}, '--batch_size=0'),
    (['x'], {'include_path': '/no/such/place'}, '--include_path=/no/such/place is no directory'),
  ],
)
def test_bad_requests(loaded, names, options, message):
  with pytest.raises(errors.InputError, match=message):
    lm_harness.evaluate_tasks(loaded, names, **options)


def test_a_data_set_out_of_reach_is_named_in_one_line(loaded, monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  message = '--tasks=hellaswag: a data set cannot be read .*hellaswag.*HF_HOME'
  with pytest.raises(errors.InputError, match=message) as found:
    lm_harness.evaluate_tasks(loaded, ['hellaswag'], limit=1)
  assert '\n' not in str(found.value)
