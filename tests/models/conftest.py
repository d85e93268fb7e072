import pytest
from absl import flags


@pytest.fixture(scope='module')
def parsed_flags():
  """absl's flags as a command leaves them; tokamax would parse pytest's command line otherwise."""
  was_parsed = flags.FLAGS.is_parsed()
  flags.FLAGS.mark_as_parsed()
  yield
  if not was_parsed:
    flags.FLAGS.unparse_flags()
