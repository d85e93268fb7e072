"""Runs beside each other, from Python."""

import os

from moe_jax.analysis.comparison import comparison as comparison_lib
from moe_jax.analysis.comparison import files


class Comparison(comparison_lib.Comparison):
  """Runs as groups, and what they say of each other; printed, it is what the command prints."""

  def write(self, directory: str | os.PathLike[str], *, page: bool = True) -> files.Written:
    """Writes the page `compare.html` with pictures and tables; see `experiments.compare`.

    Args:
      directory: where to; it is made.
      page: False leaves the interactive page out, which needs the extra `compare`.

    Raises:
      errors.InputError: the extra is not installed.
    """
    return files.write(self, directory, with_page=page)


def compare(*directories: str | os.PathLike[str], baseline: str = '') -> Comparison:
  """Compares runs, grouped by what differs in their configs and paired by seed.

      found = moe_jax.compare('runs/sigmoid', 'runs/loss_free')
      print(found)
      found.write('runs/compared')

  Nothing is loaded onto a device, and runs may still be training.

  Args:
    *directories: workdirs, or directories that hold some.
    baseline: name of the group, or a directory of it, that the others are held against; '' is the
      first.

  Raises:
    errors.InputError: a directory holds no run, two runs are of one config and one seed, or no
      group is the baseline.
  """
  found = comparison_lib.compare(directories, baseline)
  return Comparison(found.groups, found.baseline)
