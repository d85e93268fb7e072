"""`moe_jax.compare`."""

import moe_jax
from tests.analysis.comparison import written


def test_runs_are_compared_and_written(tmp_path):
  written.two_groups(tmp_path, 2)
  found = moe_jax.compare(tmp_path / 'bias0', tmp_path, baseline='plain')
  assert isinstance(found, moe_jax.Comparison) and found.baseline == 'plain'
  assert [one.name for one in found.groups] == ['bias', 'plain']
  assert found.claims()[0].arm == 'bias' and 'bias against plain' in str(found)
