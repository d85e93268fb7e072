"""What mkdocs does beyond docs/: pages of other folders, the reference, links that work twice.

Links are written for a reader of the repository. On the site a link to a page or picture of the
site goes there, a link to any other file of the repository becomes the file's path, and a link to
nothing stays as it is, so that the strict build fails on it.
"""

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parents[1]
FRONT = 'README.md'  # the front page of the site
PICTURES = ('*.png', '*.svg')
LINK = re.compile(r'(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^)\s]+)\)')
CODE = re.compile(r'(^```.*?^```)', re.MULTILINE | re.DOTALL)


def studies() -> list[str]:
  """Paths of the pages below experiments/, the index first."""
  found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'experiments').rglob('*.md'))
  return sorted(found, key=lambda path: path != 'experiments/README.md')


def project() -> list[str]:
  """Paths of the pages about the repository itself."""
  return [p for p in ('CONTRIBUTING.md', 'CHANGELOG.md', 'tests/README.md') if (ROOT / p).exists()]


def guides() -> list[str]:
  """Paths of the pages that stand beside the code they are about."""
  return sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'moe_jax').rglob('*.md'))


def modules() -> list[str]:
  """Dotted names of all modules of the library, in the order of their paths."""
  names = []
  for path in sorted((ROOT / 'moe_jax').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    names.append('.'.join(parts[:-1] if parts[-1] == '__init__' else parts))
  return names


def reference() -> dict[str, str]:
  """Page -> markdown of the reference: one page per room, and one for the top of the library."""
  rooms: dict[str, list[str]] = {}
  for name in modules():
    parts = name.split('.')
    is_room = len(parts) > 1 and (ROOT / 'moe_jax' / parts[1]).is_dir()
    rooms.setdefault(parts[1] if is_room else 'top', []).append(name)
  pages = {}
  for room, names in rooms.items():
    title = 'moe_jax' if room == 'top' else f'moe_jax.{room}'
    pages[f'reference/{room}.md'] = f'# {title}\n\n' + '\n\n'.join(f'::: {n}' for n in names) + '\n'
  return pages


def title(path: str) -> str:
  """The first heading of a page of the repository."""
  text = (ROOT / path).read_text(encoding='utf-8')
  return re.search(r'^# (.+)$', text, re.MULTILINE).group(1)


def on_config(config):
  """Adds the pages that stand outside of docs/ to the navigation."""
  config.nav = [
    *config.nav,
    {'Studies': [{title(path): path} for path in studies()]},
    {
      'Reference': [
        {page.removeprefix('reference/').removesuffix('.md').replace('top', 'moe_jax'): page}
        for page in reference()
      ]
    },
    {'Project': [{title(path): path} for path in (*guides(), *project())]},
  ]
  return config


def on_files(files, config):
  """Adds the pages that stand outside of docs/, their pictures, and the reference."""
  from mkdocs.structure import files as mkdocs_files  # the tests of this file have no mkdocs

  front = mkdocs_files.File.generated(config, 'index.md', abs_src_path=str(ROOT / FRONT))
  files.append(front)
  pages = [*studies(), *guides(), *project()]
  pictures = [p for kind in PICTURES for p in (ROOT / 'experiments').rglob(kind)]
  for path in (*pages, *(str(p.relative_to(ROOT)) for p in pictures)):
    files.append(mkdocs_files.File.generated(config, path, abs_src_path=str(ROOT / path)))
  for page, text in reference().items():
    files.append(mkdocs_files.File.generated(config, page, content=text))
  return files


def site_path(path: str) -> str:
  """The path of a file of the repository within the site."""
  return 'index.md' if path == FRONT else path.removeprefix('docs/')


def resolved(match: re.Match, page: str, sources: set[str]) -> str:
  """A link or picture of a page as it stands on the site.

  Args:
    match: of LINK.
    page: the page's path in the repository.
    sources: paths within the site of all that it holds.
  """
  target, _, anchor = match['target'].partition('#')
  if not target or re.match(r'\w+:', target):
    return match[0]
  path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
  if site_path(path) in sources:
    here = posixpath.dirname(site_path(page)) or '.'
    link = posixpath.relpath(site_path(path), here) + (f'#{anchor}' if anchor else '')
    return f'{match["image"]}[{match["text"]}]({link})'
  if (ROOT / path).exists() and not match['image']:
    text = match['text'].strip('`')
    return f'`{path}`' if text in (path, target) else f'{match["text"]} (`{path}`)'
  return match[0]


def widened(markdown: str) -> str:
  """Numbered lists whose parts are indented by three spaces, which mkdocs wants to be four."""
  lines, in_list = [], False
  for line in markdown.split('\n'):
    if line and not line.startswith(' '):
      in_list = re.match(r'\d\. ', line) is not None
    lines.append(f' {line}' if in_list and line.startswith('   ') else line)
  return '\n'.join(lines)


def on_page_markdown(markdown, page, config, files):
  """Rewrites the links of a page, and its lists; blocks of code stay as they are."""
  sources = {file.src_uri for file in files}
  uri = page.file.src_uri
  outside = {'index.md': FRONT} | {p: p for p in (*studies(), *guides(), *project())}
  path = outside.get(uri, f'docs/{uri}')
  parts = CODE.split(widened(markdown))  # prose, code, prose, code, ...
  for i in range(0, len(parts), 2):
    parts[i] = LINK.sub(lambda match: resolved(match, path, sources), parts[i])
  return ''.join(parts)
