import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.experts import sorted_plan

make_plan = functools.cache(
  lambda num_experts, align: jax.jit(
    functools.partial(sorted_plan.make_plan, num_experts=num_experts, align=align)
  )
)


def reference(idx, num_experts, align):
  """The plan, one expert after the other, in Python."""
  flat = idx.reshape(-1)
  m, rows = len(flat), sorted_plan.num_rows(len(flat), num_experts, align)
  row_choice, choice_row = np.full(rows, m), np.full(m, rows)
  sizes, start = [], 0
  for expert in range(num_experts):
    (choices,) = np.nonzero(flat == expert)  # in token order
    row_choice[start : start + len(choices)] = choices
    choice_row[choices] = start + np.arange(len(choices))
    size = -(-len(choices) // align) * align
    if align == 1 and expert == num_experts - 1:
      size += (flat == num_experts).sum()  # no row outside the groups
    sizes.append(size)
    start += size
  return sorted_plan.Plan(row_choice, choice_row.reshape(idx.shape), np.array(sizes))


def check(idx, num_experts, align):
  idx = np.asarray(idx, np.int32)
  got = jax.tree.map(np.asarray, make_plan(num_experts, align)(jnp.array(idx)))
  for name, a, b in zip(sorted_plan.Plan._fields, got, reference(idx, num_experts, align)):
    np.testing.assert_array_equal(a, b, err_msg=name)
    assert a.dtype == np.int32
  # The same in words, so that a wrong reference cannot pass.
  m, rows = idx.size, len(got.row_choice)
  routed = idx < num_experts
  assert np.unique(got.choice_row[routed]).size == routed.sum()  # one row each
  np.testing.assert_array_equal(
    got.row_choice[got.choice_row[routed]], np.arange(m).reshape(idx.shape)[routed]
  )
  assert (got.row_choice < m).sum() == routed.sum()  # and all other rows are padding
  assert (got.choice_row[~routed] == rows).all()
  assert (got.group_sizes % align == 0).all()
  assert got.group_sizes.sum() <= rows
  if align == 1:
    assert got.group_sizes.sum() == rows == m
  end = np.cumsum(got.group_sizes)
  for row, choice in enumerate(got.row_choice):
    if choice < m:  # the row lies in its expert's group
      expert = idx.reshape(-1)[choice]
      assert end[expert] - got.group_sizes[expert] <= row < end[expert]


def distinct(rng, tokens, k, experts):
  return np.argsort(rng.random((tokens, experts)), axis=-1)[:, :k]


RANDOM = distinct(np.random.default_rng(0), 12, 2, 5)
HOLES = RANDOM.copy()
HOLES[[0, 3, 11]] = 5  # tokens that are not routed, the first and the last among them
CASES = {
  'random': RANDOM,
  'not routed': HOLES,
  'none routed': np.full((12, 2), 5),
  'one routed': np.concatenate([np.full((11, 2), 5), [[3, 0]]]),
  'empty first': distinct(np.random.default_rng(1), 12, 2, 4) + 1,
  'empty middle': np.array([0, 1, 3, 4])[distinct(np.random.default_rng(2), 12, 2, 4)],
  'empty last': distinct(np.random.default_rng(3), 12, 2, 4),
  'empty last, not routed': np.where(HOLES == 4, 3, HOLES),
  'all on the first': np.zeros((12, 2)),
  'all on a middle one': np.full((12, 2), 2),
  'all on the last': np.full((12, 2), 4),
}


@pytest.mark.parametrize('align', [1, 64])
@pytest.mark.parametrize('name', CASES)
def test_plan(name, align):
  check(CASES[name], 5, align)


@pytest.mark.parametrize('align', [1, 64])
@pytest.mark.parametrize(
  'tokens, k, experts',
  [
    (9, 1, 4),  # K = 1
    (7, 1, 1),  # E = 1
    (1, 3, 6),  # one token
    (1, 1, 1),  # one choice: no bits for it in the key
    (200, 2, 3),  # groups of more than one block
    (32, 4, 4),  # M is a power of two, every expert full
  ],
)
def test_plan_of_other_shapes(tokens, k, experts, align):
  check(distinct(np.random.default_rng(4), tokens, k, experts), experts, align)


def test_groups_that_exactly_fill_their_blocks_take_no_more():
  idx = np.repeat(np.arange(2), 64)[:, None]
  check(idx, 2, 64)
  np.testing.assert_array_equal(make_plan(2, 64)(jnp.array(idx)).group_sizes, [64, 64])


def test_ties_keep_token_order():
  # Expert 1 is chosen by token 0 (choice 1), 2 (choice 4) and 3 (choice 7): rows in this order.
  got = make_plan(3, 1)(jnp.array([[0, 1], [2, 0], [1, 0], [2, 1]]))
  np.testing.assert_array_equal(got.row_choice, [0, 3, 5, 1, 4, 7, 2, 6])
  np.testing.assert_array_equal(got.group_sizes, [3, 3, 2])


@pytest.mark.parametrize(
  'choices, experts, align, want',
  [
    (24, 5, 1, 24),
    (24, 5, 64, 320),  # 24 + 5 * 63 = 339: five experts with a block each
    (3, 100, 64, 192),  # no more groups than choices
    (1, 1, 64, 64),
    (128, 1, 64, 128),  # 128 + 63 = 191
  ],
)
def test_num_rows(choices, experts, align, want):
  assert sorted_plan.num_rows(choices, experts, align) == want


def test_num_rows_holds_the_worst_case():
  for m in range(1, 30):
    for experts in (1, 3, 7):
      # As many groups as possible with one choice in them, the rest on one expert.
      groups = min(m, experts)
      worst = (groups - 1) * 8 + -(-(m - groups + 1) // 8) * 8
      assert sorted_plan.num_rows(m, experts, 8) >= worst


def test_overflow_of_the_sort_key_is_refused_and_says_what_to_do():
  idx = jax.ShapeDtypeStruct((2**26, 8), jnp.int32)  # 2^29 choices

  def make(experts):
    return jax.eval_shape(lambda i: sorted_plan.make_plan(i, experts, 1), idx)

  make(2)  # 3 * 2^29 < 2^31
  with pytest.raises(ValueError, match=r'3 experts x 536870912 choices.*train\.micro_batch_size'):
    make(3)  # 4 * 2^29 = 2^31
