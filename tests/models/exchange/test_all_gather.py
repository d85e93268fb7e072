import numpy as np
import pytest

from moe_jax.models.exchange import EXCHANGES
from tests.models.exchange import operands


@pytest.mark.parametrize('case', ['random', 'one device', 'padding'])
@pytest.mark.parametrize('kind', EXCHANGES)
def test_equals_one_device(kind, case):
  args = operands.choices(case), *operands.operands()
  *got, lost = operands.run(kind)(*args)
  for name, a, b in zip(('out', 'x', 'gates', 'gate_up', 'down'), got, operands.reference(*args)):
    np.testing.assert_allclose(a, b, err_msg=name, **operands.CLOSE)
  assert not np.asarray(lost).any()


def test_any_dispatch_computes_what_arrived():
  args = operands.choices('padding'), *operands.operands()
  for dispatch, room in (('dense', 0), ('capacity', operands.P * operands.T)):
    *got, _ = operands.run('all_to_all', dispatch=dispatch, room=room)(*args)
    for a, b in zip(got, operands.reference(*args)):
      np.testing.assert_allclose(a, b, **operands.CLOSE)
