"""The interactive page: one HTML file with its data and its plotting library in it, no network.

`page.css` and `page.js` lie beside this module; the library is plotly.js, as the Python package
`plotly` (extra `compare`) brings it.
"""

import html
import importlib.util
import json
import pathlib
from typing import Any

from moe_jax import atomic_files, errors

_HERE = pathlib.Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{style}
</style></head><body>
<main id="page"></main>
<script>{library}</script>
<script>const DATA = {data};
{program}
</script></body></html>
"""


def check_library():
  """Requires what the page is drawn with; call before a comparison is made.

  Raises:
    errors.InputError: the extra `compare` is not installed.
  """
  errors.require(
    importlib.util.find_spec('plotly') is not None,
    'the page of a comparison needs plotly, which is not installed; install the extra: '
    "pip install -e '.[compare]', or leave the page out (--nopage)",
  )


def write(path: pathlib.Path, title: str, data: dict[str, Any]):
  """Writes the page.

  Args:
    path: HTML file to write.
    title: of the page.
    data: of `page_data.data`.

  Raises:
    errors.InputError: see `check_library`.
  """
  check_library()
  from plotly import offline

  # `</script>` in a name would end the script; JSON may spell the bar as \\/ as well.
  text = json.dumps({'title': title, **data}, allow_nan=False).replace('</', '<\\/')
  page = _PAGE.format(
    title=html.escape(title),
    style=(_HERE / 'page.css').read_text(encoding='utf-8'),
    library=offline.get_plotlyjs(),
    data=text,
    program=(_HERE / 'page.js').read_text(encoding='utf-8'),
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(path, page)
