import logging as std_logging
import sys
import types

import pytest
from absl import logging

from moe_jax.checkpoints import orbax_noise


@pytest.fixture
def logger():
  found = logging.get_absl_logger()
  filters = list(found.filters)
  found.filters.clear()
  yield found
  found.filters[:] = filters


@pytest.mark.parametrize(
  'path, level, shown',
  [
    ('/site-packages/orbax/checkpoint/a.py', std_logging.WARNING, False),
    ('/site-packages/orbax/checkpoint/a.py', std_logging.ERROR, True),
    ('/site-packages/jax/b.py', std_logging.WARNING, True),
    ('/site-packages/jax/b.py', std_logging.INFO, True),
  ],
)
def test_orbax_is_heard_from_error_on_and_others_always(logger, path, level, shown):
  orbax_noise.drop_orbax_chatter()
  orbax_noise.drop_orbax_chatter()
  assert len(logger.filters) == 1
  record = std_logging.LogRecord('absl', level, path, 1, 'text', (), None)
  assert bool(logger.filter(record)) == shown


def test_abandoned_reads_are_dropped_and_anything_else_goes_on(monkeypatch):
  seen = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: seen.append(unraisable.exc_value))
  orbax_noise.drop_abandoned_reads()
  hook = sys.unraisablehook
  orbax_noise.drop_abandoned_reads()
  assert sys.unraisablehook is hook  # not wrapped twice
  for text in ('Encountered error while reading array index', 'Event loop is closed', 'Bug'):
    hook(types.SimpleNamespace(exc_value=ValueError(text)))
  assert [str(one) for one in seen] == ['Bug']
