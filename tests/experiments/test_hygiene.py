"""Whether growth is told from what goes up and down."""

import jax.numpy as jnp
import pytest

from experiments.torture import hygiene


def samples(**slopes):
  """40 samples to step 2,000, flat but for `slopes`, in units a sample."""
  flat = {'resident': 2**30, 'handles': 20, 'threads': 9, 'arrays': 300, 'array_bytes': 10**6}
  return [
    hygiene.Sample(50 * i, **{k: v + i * slopes.get(k, 0) for k, v in flat.items()})
    for i in range(1, 41)
  ]


def test_a_flat_run_has_not_grown():
  wave = [s._replace(resident=2**30 + (i % 3) * 2**22) for i, s in enumerate(samples())]
  assert not hygiene.grown(wave)
  saving = [s._replace(threads=9 + 3 * (i % 5 == 1)) for i, s in enumerate(samples())]
  assert not hygiene.grown([s._replace(threads=9) for s in saving[:10]] + saving[10:])
  shrinking = [s._replace(handles=60 - i) for i, s in enumerate(samples())]
  assert not hygiene.grown(shrinking)


@pytest.mark.parametrize(
  'name, slope', [('resident', 3 * 2**20), ('handles', 1), ('threads', 1), ('arrays', 1)]
)
def test_what_grows_is_named(name, slope):
  (line,) = hygiene.grown(samples(**{name: slope}))
  assert name in line


def test_half_a_run_is_not_judged():
  assert 'too few' in hygiene.grown(samples()[:12])[0]


def test_a_sample_counts_what_this_process_holds(tmp_path):
  before = hygiene.sample(1)
  kept = jnp.arange(1000, dtype=jnp.int32)
  with (tmp_path / 'open').open('w'):
    after = hygiene.sample(2)
  assert after.handles == before.handles + 1 and after.threads == before.threads
  assert after.arrays >= before.arrays + 1
  assert after.array_bytes >= before.array_bytes + kept.nbytes
  assert after.resident > 2**24 and '| 2 |' in hygiene.table([before, after])


def test_its_run_evaluates_and_saves_on_the_way(tmp_path):
  cfg = hygiene.config(tmp_path)
  assert cfg.train.num_steps == 2000
  assert cfg.train.eval_every == cfg.checkpoint.save_every == cfg.train.routing_every == 100
