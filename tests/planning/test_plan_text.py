import dataclasses

from moe_jax.planning import plan_text, planner
from tests.planning import plans

PLAN = plans.PLAN


def test_the_table_word_by_word():
  assert (
    plan_text.table(PLAN)
    == """\
v5e:2x2: data=2, expert=2; remat full, 4 rows at a time
estimated from shapes
note: rows are few

MEMORY per device
  parameters                            2.00 GiB
  logits and loss                       1.00 GiB
  needed                                3.00 GiB
  HBM that a program may use            4.00 GiB
  exchange buffers, at their most       0.50 GiB
fits, 1.00 GiB are left

TIME per step, each resource alone at its peak
  compute              0.250 s
    along expert       0.125 s
at least 0.250 s, bound by compute: at most 12,346 tokens/s and 62.5 % MFU

WORK per device and step
  FLOPs of the model (as 'describe' counts)          2.50 T
  FLOPs computed, on the busiest device              3.00 T
  bytes through HBM                                  1.50 GB
  all-to-all along expert                            2.00 GB"""
  )


def test_what_does_not_fit_and_what_was_compiled_say_so():
  tight = dataclasses.replace(
    PLAN, fits=False, hbm_capacity_bytes=2 * 2**30, how=planner.COMPILED, mesh={}, exchange_bytes=0
  )
  text = plan_text.table(tight)
  assert 'DOES NOT FIT, 1.00 GiB too much' in text and 'exchange buffers' not in text
  assert text.startswith('v5e:2x2: one device; ')
  assert "compiled in 9 s with 2.0 GiB of this host's memory" in text


def test_a_ranking_has_a_line_per_plan():
  _, first, second = plan_text.ranking([PLAN, dataclasses.replace(PLAN, how='compiled')]).split(
    '\n'
  )
  assert first.split() == (
    '1 3.0 1.0 0.25 62.5 % compute data=2,expert=2; full, 4 (estimated from shapes)'.split()
  )
  assert second.endswith('data=2,expert=2; full, 4')
