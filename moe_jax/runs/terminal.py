"""Where a run says its lines, which may go away before the run ends."""

from absl import logging

from moe_jax.runs import trained_run


class Terminal:
  """Prints lines as long as somebody reads them; without a reader a run goes on in silence.

  `train | head`, a closed terminal and a log file on a full disk all end in an OSError of the line
  that is printed next. It is told once, on standard error.

  Attributes:
    lost: whether lines are dropped.
  """

  def __init__(self, say: trained_run.Say):
    self._say = say
    self.lost = False

  def __call__(self, line: str):
    """Prints one line, or drops it."""
    if self.lost:
      return
    try:
      self._say(line)
    except OSError as e:
      self.lost = True
      logging.warning(
        f'What this run prints has lost its reader ({e.strerror or e}): training goes on without '
        'it, metrics.jsonl and all other files are written.'
      )


def of(say: trained_run.Say) -> Terminal:
  """Returns `say` as a `Terminal`, which it may be already."""
  return say if isinstance(say, Terminal) else Terminal(say)
