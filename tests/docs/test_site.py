"""The pages of the site: tables held to the code, modules and flags all there, links, lengths."""

import ast
import importlib
import pathlib
import re

import pytest

from configs import base
from docs import generate, rooms, site_hook

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
  *sorted(ROOT.glob('*.md')),
  *sorted((ROOT / 'docs').rglob('*.md')),
  *sorted((ROOT / 'experiments').rglob('*.md')),
  *sorted((ROOT / 'moe_jax').rglob('*.md')),
]


def links(path: pathlib.Path) -> list[str]:
  """Targets of the links and pictures of a page, but for those inside of code."""
  text = re.sub(r'^```.*?^```|`[^`\n]*`', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
  return [match['target'] for match in site_hook.LINK.finditer(text)]


@pytest.mark.parametrize('name', generate.MAKERS)
def test_tables_are_those_of_the_code(name):
  text = (generate.TABLES / f'{name}.md').read_text(encoding='utf-8')
  assert text == generate.MAKERS[name](), 'run python -m docs.generate'


def test_tables_are_complete():
  """A table without a row for something that is there would be equal to itself all the same."""
  text = {name: (generate.TABLES / f'{name}.md').read_text() for name in generate.MAKERS}
  for name in ('train', 'evaluate', 'plan', 'bench.gpu', 'parity'):
    assert f'\n## {name}\n' in text['commands']
  assert '| `--max_new_tokens=INTEGER` | `64` |' in text['commands']
  assert '| `quickstart` |' in text['configs'] and '`gshard_x1.5`' in text['configs']
  keys = dict(flat(base.get_config().to_dict()))
  for key in keys:
    shown = re.sub(r'^(model\.moe\.balance\.(?!adaptive)\w+)\.\w+$', r'\1', key)
    assert f'| `{shown}` |' in text['config_fields'], key
  assert not re.search(r'\|  \|$', text['config_fields'], re.MULTILINE), 'a field without a comment'


def flat(values, prefix=''):
  for name, value in values.items():
    key = f'{prefix}{name}'
    if isinstance(value, dict) and value:
      yield from flat(value, f'{key}.')
    else:
      yield key, value


def test_the_comment_of_a_field_is_beside_it_or_above_it():
  schema = importlib.import_module('moe_jax.config.schema')
  fields = generate.comments(schema.OptimConfig)
  assert fields['peak_lr'].meaning == 'learning rate at the end of the warm-up'
  assert fields['stages'].meaning.startswith('stages: ((until share of num_steps,')
  assert fields['schedule'].meaning.startswith('one of `multi_step` `cosine`')


def test_every_module_stands_in_the_reference_once():
  """Counted in the source tree by other means than those of the hook."""
  files = [p for p in (ROOT / 'moe_jax').rglob('*.py')]
  text = '\n'.join(site_hook.reference().values())
  found = re.findall(r'^::: (\S+)$', text, re.MULTILINE)
  assert len(found) == len(set(found)) == len(files)
  for page in site_hook.reference():
    assert re.fullmatch(r'reference/[a-z_]+\.md', page)


def test_links_of_all_pages_lead_to_files():
  """Of the repository; the strict build looks at those of the site, anchors included."""
  for page in PAGES:
    for target in links(page):
      path = target.partition('#')[0]
      if path and not re.match(r'https?:', path):
        beside = (page.parent / path).resolve()
        generated = path.startswith('../reference/') and 'docs' in page.parts
        assert generated or beside.exists(), f'{page.relative_to(ROOT)}: {target}'


def test_links_are_rewritten_for_the_site():
  sources = {'index.md', 'topics/data.md', 'pictures/mesh.png', 'experiments/bench/README.md'}

  def on_site(text, page):
    return site_hook.LINK.sub(lambda match: site_hook.resolved(match, page, sources), text)

  assert on_site('[a](docs/topics/data.md#x)', 'README.md') == '[a](topics/data.md#x)'
  assert on_site('![m](../pictures/mesh.png)', 'docs/topics/a.md') == '![m](../pictures/mesh.png)'
  assert on_site('[f](../../README.md)', 'docs/topics/a.md') == '[f](../index.md)'
  away = on_site('[b](../../experiments/bench/README.md)', 'docs/topics/a.md')
  assert away == '[b](../experiments/bench/README.md)'
  assert on_site('[code](../../setup.py)', 'docs/topics/a.md') == 'code (`setup.py`)'
  assert on_site('[nothing](none.md)', 'docs/topics/a.md') == '[nothing](none.md)'


def test_parts_of_numbered_lists_are_indented_as_mkdocs_wants_it():
  text = '    code\n\n1. a\n\n       code\n\n   * b\n\nend\n\n    code'
  want = '    code\n\n1. a\n\n        code\n\n    * b\n\nend\n\n    code'
  assert site_hook.widened(text) == want


def test_no_repository_is_invented():
  for page in PAGES:
    assert not re.search(r'https?://(www\.)?git(hub|lab)\.com/[\w-]+/moe_jax', page.read_text())


def test_the_readme_is_short_and_its_two_commands_are_one_line_each():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 150
  venv = '    python3 -m venv .venv && .venv/bin/pip install -q -e '
  train = '.venv/bin/python -m experiments.train --config=configs/quickstart.py'
  assert f'{venv}. && {train} --workdir=runs/quickstart\n' in text
  assert f"{venv}'.[test]' && .venv/bin/python -m pytest\n" in text
  version = importlib.import_module('moe_jax').__version__
  assert f'version = {{{version}}}' in text
  assert f'## {version} (' in (ROOT / 'CHANGELOG.md').read_text()


def test_python_in_the_pages_compiles():
  for page in PAGES:
    for block in re.findall(r'^```python\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL):
      ast.parse(block)


def test_the_picture_shows_the_rooms_of_the_import_test():
  texts = {text.get_text() for text in rooms.draw().axes[0].texts}
  names = {name for floor in rooms.floors() for name in floor}
  assert names <= texts and {'models', 'training', 'errors'} <= names
