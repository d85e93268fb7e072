import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.devices import partitioning
from moe_jax.models import model_variables, transformer
from moe_jax.training import objective
from tests import tiny

CFG = tiny.make().model
L = CFG.max_seq_len
# The same float32 sums over another set of rows: 1e-5 relative, of logits of magnitude up to 5.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@functools.cache
def forward(model=CFG):
  """Jitted (params, tokens, positions, segment_ids) -> logits."""
  apply = transformer.Transformer(model).apply
  return tiny.jit(lambda params, *rows: apply({'params': params}, *rows).logits)


def inputs(rows):
  return [jnp.array(rows[key]) for key in ('tokens', 'positions', 'segment_ids')]


def logits_of(rows, model=CFG):
  """Logits of up to 8 rows, always computed as 8: one compilation serves all tests."""
  count = len(rows['tokens'])
  padded = {key: np.resize(value, (8, L)) for key, value in rows.items()}
  return np.asarray(forward(model)(tiny.params(model), *inputs(padded)))[:count]


def gradient_jaxpr(**overrides):
  cfg = tiny.make(**overrides)
  params = model_variables.abstract_params(cfg.model)
  batch = {key: jnp.array(value) for key, value in tiny.batch().items()}
  fn = functools.partial(objective.gradients, cfg)
  return jax.make_jaxpr(fn)(params, {}, batch, jnp.uint32(0)).jaxpr


def test_program_does_not_grow_with_depth():
  few = len(list(tiny.equations(gradient_jaxpr(model__num_layers=2))))
  many = len(list(tiny.equations(gradient_jaxpr(model__num_layers=9, model__num_dense_layers=4))))
  assert few == many


@pytest.mark.parametrize('remat', ['moe_core', pytest.param('full', marks=pytest.mark.slow)])
def test_remat_changes_no_number(remat):
  params, batch = tiny.params(CFG), tiny.batch()
  loss, grads = tiny.gradients()(params, batch)
  loss2, grads2 = tiny.gradients(model__remat=remat)(params, batch)
  np.testing.assert_array_equal(loss.stats.sums.load, loss2.stats.sums.load)
  np.testing.assert_allclose(loss.main, loss2.main, rtol=1e-6)
  # Recomputed in other fusions: the last bits of float32 may differ.
  tiny.assert_trees_close(grads2, grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('remat, top_ks', [('none', 1), ('moe_core', 1), ('full', 1)])
def test_routing_is_never_recomputed(remat, top_ks):
  """A second top-k over rounded-otherwise scores could send the gradient to other experts."""
  names = [eqn.primitive.name for eqn in tiny.equations(gradient_jaxpr(model__remat=remat))]
  assert names.count('top_k') == top_ks
  assert names.count('sort') == 1


def test_remat_full_keeps_less_than_moe_core_than_none():
  def kept(remat):
    """Bytes that come out of the forward scans: residuals, and carries of a size that is fixed."""
    jaxpr = gradient_jaxpr(model__remat=remat)
    scans = [eqn for eqn in tiny.equations(jaxpr) if eqn.primitive.name == 'scan']
    forward = scans[: len(scans) // 2]
    outs = [v.aval for eqn in forward for v in eqn.outvars]
    return sum(aval.size * aval.dtype.itemsize for aval in outs)

  assert kept('full') < kept('moe_core') < kept('none')


def test_padding_and_other_documents_change_no_logit():
  rows = tiny.batch(((5, 4, 3), (5, 4, 3), (5, 4, 3), (5, 4, 3)))
  for key in rows:
    rows[key][:] = rows[key][:1]
  rows['tokens'][1, 3] += 1  # in the first document
  rows['tokens'][2, 6] += 1  # in the second
  rows['tokens'][3, 13:] = 7  # padding
  rows['tokens'] %= CFG.vocab_size
  logits = logits_of(rows)
  differs = (logits != logits[:1]).any(-1)
  want = np.zeros((4, L), bool)
  want[1, 3:5] = True  # from the token on, to the end of its document
  want[2, 6:9] = True
  np.testing.assert_array_equal(differs[:, :12], want[:, :12])


def test_a_document_packed_with_others_is_read_as_if_alone():
  rows, alone = tiny.batch(((5, 4, 3),)), tiny.batch(((9,),))
  alone['tokens'][0, :4] = rows['tokens'][0, 5:9]
  np.testing.assert_allclose(logits_of(rows)[0, 5:9], logits_of(alone)[0, :4], **CLOSE)


def test_dense_model():
  cfg = tiny.make(model__moe__num_experts=0).model
  params = tiny.params(cfg)
  assert 'moe_layers' not in params
  assert params['dense_layers']['mlp']['down'].shape == (3, 24, 16)
  out = jax.eval_shape(
    lambda p: transformer.Transformer(cfg).apply({'params': p}, *inputs(tiny.batch())), params
  )
  assert out.stats is None and out.mtp is None
  assert out.logits.shape == (8, L, 32)


def test_a_tied_head_has_the_gradient_of_both_ends():
  one = {'model__num_layers': 1, 'model__num_dense_layers': 1, 'model__moe__num_experts': 0}
  tied = tiny.params(tiny.make(**one, model__tie_embeddings=True).model)
  assert 'head' not in tied
  loss, grads = tiny.gradients(**one, model__tie_embeddings=True)(tied, tiny.batch())
  apart = {**tied, 'head': tied['embedding'].T}
  loss_apart, grads_apart = tiny.gradients(**one)(apart, tiny.batch())
  np.testing.assert_array_equal(loss.main, loss_apart.main)
  both = grads_apart.pop('head').T + grads_apart['embedding']
  tiny.assert_trees_close(grads, grads_apart | {'embedding': both}, rtol=1e-5, atol=1e-6)


def test_all_layers_moe_and_stats_per_layer():
  cfg = tiny.make(model__num_dense_layers=0).model
  params = model_variables.abstract_params(cfg)
  assert 'dense_layers' not in params
  out = jax.eval_shape(
    lambda p: transformer.Transformer(cfg).apply({'params': p}, *inputs(tiny.batch())), params
  )
  assert out.stats.sums.load.shape == (3, 8)
  assert out.stats.losses['expert_level'].shape == (3,)


def test_dtypes_of_parameters():
  shapes = model_variables.abstract_params(tiny.make(model__param_dtype='bfloat16').model)
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    wide = path[-1].key in ('scale', 'router')  # norms and router stay in float32
    assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), jax.tree_util.keystr(path)


def test_bfloat16_compute_keeps_router_softmaxes_and_logits_in_float32():
  cfg = tiny.make(model__dtype='bfloat16').model
  params = tiny.params(cfg)
  rows = inputs(tiny.batch())

  def apply(p):
    return transformer.Transformer(cfg).apply({'params': p}, *rows)

  dots = 0
  for eqn in tiny.equations(jax.make_jaxpr(apply)(params).jaxpr):
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if eqn.primitive.name in ('top_k', 'exp', 'rsqrt'):
      assert avals[0].dtype == jnp.float32, eqn
    if eqn.primitive.name == 'dot_general':
      router = avals[1].shape == (cfg.embed_dim, cfg.moe.num_experts)
      dots += router
      assert avals[0].dtype == (jnp.float32 if router else jnp.bfloat16), eqn
  assert dots == 1  # the scan's body, once
  out = jax.eval_shape(apply, params)
  assert out.logits.dtype == jnp.float32


def test_bfloat16_compute_is_close_to_float32():
  cfg = tiny.make(model__dtype='bfloat16').model
  rows = tiny.batch()
  real = rows['segment_ids'] > 0
  wide, low = logits_of(rows)[real], logits_of(rows, model=cfg)[real]
  # 8 bits of mantissa through 3 layers; a few tokens may change an expert, so the median counts.
  assert np.median(np.abs(wide - low)) < 0.03 * wide.std()


LATENT = dict(model__attention__kind='mla', model__attention__mla__q_lora_rank=6)


@pytest.mark.parametrize('overrides', [{}, LATENT | dict(model__num_mtp_layers=2)])
def test_every_parameter_names_its_axes(overrides):
  rules = dict(partitioning.LOGICAL_AXIS_RULES)
  model = tiny.make(**overrides).model
  boxed = jax.eval_shape(functools.partial(model_variables.init, model), jax.random.key(0))[
    'params'
  ]
  boxes = jax.tree_util.tree_leaves_with_path(
    boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )
  for path, box in boxes:
    where = jax.tree_util.keystr(path)
    assert isinstance(box, nn.LogicallyPartitioned), where
    assert len(box.names) == box.value.ndim, where
    assert set(box.names) <= set(rules), where
    stack = {'moe_layers': 'stage_layers', 'dense_layers': 'layers', 'mtp_layers': 'layers'}
    assert (box.names[:1] == (stack.get(path[0].key),)) == (path[0].key in stack), where
  stacked = boxed['moe_layers']['moe']['gate_up']
  assert stacked.names == ('stage_layers', 'expert', 'expert_embed', 'gate_up', 'expert_mlp')


@pytest.mark.parametrize('axes', [{'tensor': 2}, {'fsdp': 2}])
def test_rows_of_an_embedding_whose_vocabulary_or_width_is_split(axes):
  table = np.arange(32 * 8, dtype=np.float32).reshape(32, 8)
  ids = np.array([[0, 5, 17, 31], [16, 15, 1, 30]], np.int32)
  with partitioning.activate(tiny.mesh(2, **axes)):
    found = jax.jit(transformer.embedded)(ids, table)
  np.testing.assert_array_equal(found, table[ids])
