"""What a dump of a step holds, NaN included, and how it is found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.runs import loop_actions, nonfinite_dump
from moe_jax.training import train_state
from tests import tiny

CFG = tiny.make(model__moe__num_experts=0, model__num_layers=1, train__batch_size=3)
FIGURES = {'step': 4, 'rows': (9, 11), 'last_step': 7, 'loss': float('nan'), 'grad_norm': 2.0}


class Corpus:
  fingerprint = 'text'
  tokenizer = tokenizer_lib.byte_tokenizer(CFG.data.bos_token, CFG.data.eos_token)


@pytest.fixture(scope='module')
def dumped(tmp_path_factory):
  """(workdir, state, batch) of a run that stopped, whose newer dump replaced an older one."""
  workdir = tmp_path_factory.mktemp('run')
  one = loop_actions.Member(CFG, Corpus, workdir, None)
  params = jax.tree.map(jnp.copy, tiny.params(CFG.model))
  params['head'] = params['head'].at[0, 3].set(jnp.nan)
  state = train_state.TrainState(jnp.int32(7), jnp.uint32(5), params, {}, {'mu': params})
  batch = tiny.batch(((16,), (5, 6), (9,)))
  for _ in range(2):
    nonfinite_dump.write(workdir / 'nonfinite/4', one, FIGURES, state, batch)
  Corpus.tokenizer.save(workdir / 'tokenizer.json')
  return workdir, state, batch


def test_weights_batch_and_figures_are_read_back_as_they_were(dumped):
  workdir, state, batch = dumped
  dump = nonfinite_dump.read(workdir, None)
  assert dump.cfg.model == CFG.model and dump.cfg.train == CFG.train
  assert dump.figures == {**FIGURES, 'rows': [9, 11], 'loss': None}
  jax.tree.map(np.testing.assert_array_equal, dump.state['params'], state.params)
  assert int(dump.state['seed']) == 5 and 'opt_state' not in dump.state
  for key, want in batch.items():
    np.testing.assert_array_equal(dump.batch[key], want)
  # Eight devices are here, which three rows do not fill: the step is taken on one of them.
  assert dump.mesh.size == 1


def test_stages_become_copies():
  cfg, mesh = nonfinite_dump._placed(tiny.make(mesh__stage=2, mesh__data=4))
  assert (cfg.mesh.stage, cfg.mesh.data) == (1, 8) and dict(mesh.shape)['data'] == 8
  _, mesh = nonfinite_dump._placed(tiny.make(mesh__stage=2, mesh__data=-1))
  assert dict(mesh.shape)['data'] == 8


def test_the_text_of_a_row_leaves_out_what_is_no_token(dumped):
  workdir, _, batch = dumped
  dump = nonfinite_dump.read(workdir, 4)
  h, i, mark = Corpus.tokenizer.encode('hi!')
  dump.batch['tokens'][1, :4] = [h, i, 10**6, mark]
  text = nonfinite_dump.texts(workdir, dump, [1])[1]
  assert text.startswith('hi!')


def test_what_is_not_there_is_said(dumped, tmp_path):
  with pytest.raises(errors.InputError, match=r'holds no dump in nonfinite/'):
    nonfinite_dump.read(tmp_path, None)
  with pytest.raises(errors.InputError, match=r'--step=5 has no dump .*there are steps 4'):
    nonfinite_dump.read(dumped[0], 5)
