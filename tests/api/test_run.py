"""A tiny run trained, loaded and used through `import moe_jax`, beside what it should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from configs import smoke
from moe_jax import errors
from moe_jax.api import load as load_lib
from moe_jax.api import train as train_lib
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from tests.interop import checkpoints

MAKE_MESH = partitioning.make_mesh
TEXT = 'def main(x):'
QUICK = {
  'train.num_steps': 2,
  'train.log_every': 1,
  'optim.warmup_steps': 0,
  'data.synthetic_documents': 120,
  'data.heldout_fraction': 0.2,
  'model.num_layers': 3,
  'model.num_dense_layers': 1,
}


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:2]))
    yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  root = tmp_path_factory.mktemp('api')
  quick = QUICK | {'data.cache_dir': str(root / 'cache')}
  return moe_jax.train('smoke', root / 'run', report=False, say=lambda line: None, **quick)


@pytest.fixture(scope='module')
def run(trained):
  return moe_jax.load(trained.directory)


def plain(run, ids) -> transformer.Output:
  """Of one row without padding, on one device."""
  tokens = jnp.asarray([ids], jnp.int32)
  places = jnp.arange(len(ids), dtype=jnp.int32)[None]
  variables = jax.device_get(run.variables)
  model = transformer.Transformer(run.config.model)
  return jax.jit(model.apply)(variables, tokens, places, jnp.ones_like(tokens))


def plain_logits(run, ids) -> np.ndarray:
  """[L, V]"""
  return np.asarray(plain(run, ids).logits[0])


def test_vectors_of_texts_are_means_over_their_own_tokens(run):
  texts = [TEXT, 'a', 'class Longer:\n  pass', *(f'{i} = {i * i}' for i in range(40))]
  found = run.embed(texts)
  assert found.shape == (43, run.config.model.embed_dim) and found.dtype == np.float32
  for i in (0, 42):
    out = plain(run, run.encode(texts[i]))
    np.testing.assert_allclose(found[i], out.normed[0].mean(axis=0), rtol=1e-4, atol=1e-5)
  with pytest.raises(errors.InputError, match='the text has .* tokens'):
    run.embed(['x' * 10_000])


def test_the_vector_of_one_text_is_a_batch_of_one(run):
  np.testing.assert_array_equal(run.embed(TEXT), run.embed([TEXT]))
  assert run.embed(TEXT).shape == (1, run.config.model.embed_dim)
  with pytest.raises(errors.InputError, match=r'texts\[1\]=\[1, 2\] must be a text'):
    run.embed(['a', [1, 2]])


def test_what_was_trained_is_what_is_loaded(trained, run):
  assert (run.step, run.interrupted_by) == (2, '') and run.config.model == trained.config.model
  jax.tree.map(np.testing.assert_array_equal, dict(run.variables), dict(trained.variables))
  assert repr(run).startswith('moe_jax.Run(') and 'step=2' in repr(run)
  assert isinstance(run, moe_jax.Run)


def test_logits_of_texts_and_ids(run):
  ids = run.encode(TEXT)
  assert ids[0] == run.tokenizer.bos_id
  found = run.logits(TEXT)
  assert found.shape == (len(ids), run.config.model.vocab_size) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, plain_logits(run, ids), atol=1e-5)
  for same in (ids, np.array(ids), jnp.array(ids)):
    np.testing.assert_array_equal(run.logits(same), found)
  rows = np.array([ids, ids[::-1], ids])
  both = run.logits(rows)
  assert both.shape == (3, *found.shape)
  np.testing.assert_allclose(both[1], plain_logits(run, ids[::-1]), atol=1e-5)
  short, long = run.logits(['a', TEXT])
  assert short.shape[0] == 2
  np.testing.assert_allclose(long, found, atol=1e-5)


@pytest.mark.parametrize(
  'text, message',
  [
    ([], 'must be integers'),
    ([0.5], 'must be integers'),
    ([[1, 2], [3]], 'all be of one length'),
    ([-1], '^ids: -1 is no token id; ids are whole numbers from 0 to 287'),
    ([[1, 2], [3, 288]], '^ids: 288 is no token id'),
    ('x' * 200, 'has 201 tokens, but must have 1 to model.max_seq_len=128'),
    ('\ud800', 'must be UTF-8'),
    (['a', [1, 2]], r'text\[1\]=\[1, 2\] must be a text as the others are'),
    ([[1, 2], 'a'], r'text\[0\]=\[1, 2\] must be a text as the others are'),
  ],
)
def test_what_cannot_be_read_is_refused(run, text, message):
  with pytest.raises(moe_jax.InputError, match=message):
    run.logits(text)


def test_greedy_text_follows_the_logits(run):
  (text,) = run.generate([TEXT], max_new_tokens=4, temperature=0)
  ids = run.encode(TEXT)
  for _ in range(4):
    ids.append(int(run.logits(ids)[-1].argmax()))
  assert run.tokenizer.eos_id not in ids
  assert text == run.tokenizer.decode(ids[-4:])
  assert run.generate(TEXT, 4, temperature=0) == [text]
  # A token that ends it, and a string that does.
  assert run.generate([ids[:-4]], 4, temperature=0, stop_ids=[ids[-4]]) == ['']
  assert run.generate(TEXT, 4, temperature=0, stop=text[-1]) == [text[: text.index(text[-1])]]


def test_draws_follow_the_seed_and_options_arrive(run):
  drawn = [run.generate(TEXT, 6, seed=seed) for seed in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]
  assert run.generate(TEXT, 6, top_k=1) == run.generate(TEXT, 6, temperature=0)
  pieces = []
  found = run.generate(TEXT, 6, on_text=lambda row, text: pieces.append(text))
  assert [''.join(pieces)] == found == drawn[0]
  for name, value in {'top_p': 2, 'min_p': 1, 'repetition_penalty': 0}.items():
    with pytest.raises(moe_jax.InputError, match=name):
      run.generate(TEXT, **{name: value})


def test_routing_is_what_the_model_does(run):
  found = run.routing(TEXT)
  ids, moe = run.encode(TEXT), run.config.model.moe
  layers, k = run.config.model.num_moe_layers, moe.num_experts_per_tok
  assert layers == 2 and len(found.tokens) == len(ids)
  assert ''.join(found.tokens[1:]) == TEXT
  assert found.experts.shape == found.gates.shape == (layers, len(ids), k)
  assert found.load.shape == (layers, moe.num_experts)
  assert (found.load.sum(axis=1) == len(ids) * k).all()
  assert found.load[1, 3] == (found.experts[1] == 3).sum()
  # The gates of a softmax router are its probabilities, best first, and not divided by their sum.
  assert not moe.norm_topk_prob and (np.diff(found.gates) <= 0).all()
  tokens = jnp.asarray([ids], jnp.int32)
  args = (tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
  _, sown = transformer.Transformer(run.config.model).apply(
    jax.device_get(run.variables), *args, mutable=['intermediates']
  )
  scores = np.asarray(sown['intermediates']['moe_layers']['moe']['scores'][0])[:, 0]
  want = np.take_along_axis(scores, found.experts, axis=-1)
  np.testing.assert_allclose(found.gates, want, atol=1e-5)
  with pytest.raises(moe_jax.InputError, match='routing reads one text'):
    run.routing([ids, ids])


def test_held_out_figures(run, trained):
  figures = run.evaluate(progress=False)
  assert 4 < figures.loss < 7 and str(figures).startswith('bits_per_byte=')
  assert trained.evaluate(progress=False).loss == figures.loss


def test_configs_in_all_their_forms():
  page = smoke.get_config()
  want = parse.from_dict(page.to_dict())
  for form in ('smoke', 'configs/smoke.py', page, page.to_dict(), want):
    assert train_lib.resolve(form, {}) == want
  changed = train_lib.resolve('smoke', {'train.num_steps': 70, 'optim.peak_lr': 0.5})
  assert changed.train.num_steps == 70 and changed.optim.peak_lr == 0.5
  assert dataclasses.replace(changed, train=want.train, optim=want.optim) == want
  for key, message in (
    ('train.num_step', "config.train.num_step is not a known key; did you mean 'num_steps'"),
    ('train.num_steps.x', 'config.train.num_steps.x is not a known key'),
  ):
    with pytest.raises(moe_jax.InputError, match=message):
      train_lib.resolve('smoke', {key: 1})


def test_a_template_that_another_format_would_ignore():
  template = {'data.chat_template': '{{ x }}'}
  with pytest.raises(moe_jax.InputError, match='chat_template is set but .* would ignore it'):
    train_lib.resolve('smoke', template)
  both = train_lib.resolve('smoke', template | {'data.chat_format': 'template'})
  of_run = dataclasses.replace(both.data, chat_format='deepseek_llm')  # as a tuned run has it
  assert train_lib.resolve(dataclasses.replace(both, data=of_run), {}).data == of_run


def test_a_run_without_a_checkpoint_is_named_by_its_flag(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(moe_jax.InputError, match='^--against=.* holds no finished checkpoint'):
    load_lib.load(tmp_path, flag='--against')


def test_a_directory_that_is_neither(tmp_path):
  with pytest.raises(moe_jax.InputError, match='neither a run .* nor a downloaded Hugging Face'):
    moe_jax.load(tmp_path)
  with pytest.raises(moe_jax.InputError, match='hf download ORG/NAME --local-dir=DIR'):
    moe_jax.load('deepseek-ai/DeepSeek-V2-Lite')


def test_flags_of_the_other_kind_of_directory_are_refused(tmp_path):
  (tmp_path / 'run/checkpoints').mkdir(parents=True)
  with pytest.raises(moe_jax.InputError, match="param_dtype='bfloat16' has no effect on a run"):
    moe_jax.load(tmp_path / 'run', param_dtype='bfloat16')
  for name in ('config.json', 'a.safetensors'):
    (tmp_path / name).touch()
  with pytest.raises(moe_jax.InputError, match='step=3: .* has no steps'):
    moe_jax.load(tmp_path, step=3)


@pytest.mark.slow  # compiles three models
def test_a_downloaded_checkpoint(tmp_path, monkeypatch):
  hf = checkpoints.config('deepseek_v2', torch_dtype='float32')
  weights = checkpoints.tensors(hf, np.float32)
  directory = checkpoints.write(tmp_path / 'download', hf, weights)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  run = moe_jax.load(directory)
  found = run.logits('abc')
  np.testing.assert_allclose(found, plain_logits(run, run.encode('abc')), rtol=1e-4, atol=1e-4)
  assert run.routing('abc').experts.shape[1] == 4
  assert len(run.generate('abc', 3, temperature=0)) == 1
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
  assert moe_jax.load(directory, param_dtype='bfloat16').config.model.dtype == 'bfloat16'
  with pytest.raises(moe_jax.InputError, match='step=3: .* has no steps'):
    moe_jax.load(directory, step=3)


def test_a_dense_model_has_no_routing(tmp_path):
  hf = checkpoints.config('llama', torch_dtype='float32')
  directory = checkpoints.write(tmp_path / 'llama', hf, checkpoints.tensors(hf, np.float32))
  run = moe_jax.load(directory)
  assert run.logits('ab').shape == (3, run.config.model.vocab_size)
  with pytest.raises(moe_jax.InputError, match='a dense model, which routes nothing'):
    run.routing('ab')


def test_a_question_is_asked_in_the_format_of_training(run):
  want = run.encode('User: What?\n\nAssistant:')
  found = run.chat('What?', 4, temperature=0)
  assert found == run.generate([want], 4, temperature=0)[0].removeprefix(' ')
  turns = [{'role': 'user', 'content': 'What?'}]
  assert run.chat(turns, 4, temperature=0) == found
  with pytest.raises(moe_jax.InputError, match="messages: message 0 has role 'me'"):
    run.chat([{'role': 'me', 'content': ''}])
  with pytest.raises(moe_jax.InputError, match='must end with a question'):
    run.chat([*turns, {'role': 'assistant', 'content': 'This.'}])
