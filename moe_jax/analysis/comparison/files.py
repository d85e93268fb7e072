"""Writes a comparison: the interactive page, pictures and tables."""

import os
import pathlib
from typing import NamedTuple

from moe_jax.analysis.comparison import comparison as comparison_lib
from moe_jax.analysis.comparison import page, page_data, pictures, tables
from moe_jax.config import paths


class Written(NamedTuple):
  """What was written."""

  page: pathlib.Path | None  # compare.html
  pictures: list[pictures.Drawn]
  tables: list[pathlib.Path]


def title(found: comparison_lib.Comparison) -> str:
  """A heading: which groups are compared."""
  return f'Comparison of {", ".join(one.name for one in found.groups)}'


def write(
  found: comparison_lib.Comparison, directory: str | os.PathLike[str], *, with_page: bool = True
) -> Written:
  """Writes `compare.html`, PNG and CSV files.

  Args:
    found: the comparison.
    directory: where to; it is made.
    with_page: False leaves the page out, which needs the extra `compare`.

  Raises:
    errors.InputError: the extra is not installed.
  """
  out = paths.local(directory, 'directory')
  if with_page:
    page.check_library()
  out.mkdir(parents=True, exist_ok=True)
  whole = out / 'compare.html' if with_page else None
  if whole is not None:
    page.write(whole, title(found), page_data.data(found) | {'palette': pictures.PALETTE})
  return Written(whole, pictures.draw(found, out), tables.write(found, out))
