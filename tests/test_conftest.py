import types

import pytest

from tests import conftest


def test_slow_tests_are_left_out_where_ci_is_late_and_no_others(monkeypatch):
  slow, quick = (
    types.SimpleNamespace(get_closest_marker=lambda name, own=own: name if name in own else None)
    for own in (['slow'], ['parametrize'])
  )
  monkeypatch.delenv('MOE_JAX_SLOW_UNTIL', raising=False)
  conftest.pytest_runtest_setup(slow)
  monkeypatch.setenv('MOE_JAX_SLOW_UNTIL', '9e12')
  conftest.pytest_runtest_setup(slow)
  monkeypatch.setenv('MOE_JAX_SLOW_UNTIL', '1e9')
  with pytest.raises(pytest.skip.Exception, match='for the time'):
    conftest.pytest_runtest_setup(slow)
  conftest.pytest_runtest_setup(quick)
