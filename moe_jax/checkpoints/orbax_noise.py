"""Keeps messages of orbax that repeat what the checkpointer reports off the screen."""

import logging as std_logging
import sys
from typing import Any

from absl import logging


def drop_orbax_chatter():
  """Silences orbax below ERROR; what it warns of (missing metadata) is reported by this module."""
  logger = logging.get_absl_logger()
  if _is_worth_showing not in logger.filters:
    logger.addFilter(_is_worth_showing)


def _is_worth_showing(record: std_logging.LogRecord) -> bool:
  return record.levelno >= std_logging.ERROR or '/orbax/' not in record.pathname


def drop_abandoned_reads():
  """Keeps one broken file from filling the screen.

  When a read fails, orbax drops the others that are under way and python prints a page for each,
  from other threads and at any later time; the failure itself is raised and reported.
  """
  previous = sys.unraisablehook
  if getattr(previous, 'drops_abandoned_reads', False):
    return

  def hook(unraisable: Any):
    text = str(unraisable.exc_value)
    if not text.startswith(('Encountered error while reading array', 'Event loop is closed')):
      previous(unraisable)

  hook.drops_abandoned_reads = True
  sys.unraisablehook = hook
