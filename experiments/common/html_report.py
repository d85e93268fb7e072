"""A report as a list of blocks, written twice: Markdown, and HTML that is whole in one file."""

import base64
import dataclasses
import html
import io
import pathlib
import re
from collections.abc import Sequence

from moe_jax import atomic_files

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block;
  overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left;
  font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; }
code, pre { background: #f4f4f4; padding: .1rem .3rem; font-size: 14px; }
pre { padding: .6rem; overflow-x: auto; }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
  """A title; level 1 is that of the report."""

  text: str
  level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
  """A paragraph; **bold**, *slanted*, `code` and [links](to) as in Markdown."""

  text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
  """A list of paragraphs."""

  items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Code:
  """Lines as they are typed or printed."""

  lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells of text, of which pipes are no part."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG beside the report."""

  path: pathlib.Path
  caption: str


Block = Heading | Text | Bullets | Code | Table | Picture


def write(blocks: Sequence[Block], directory: pathlib.Path) -> list[pathlib.Path]:
  """Writes `report.md`, which refers to the pictures, and `report.html`, which holds them.

  Args:
    blocks: the report; pictures lie in `directory`.
    directory: where to.

  Returns:
    The two paths.
  """
  paths = [directory / 'report.md', directory / 'report.html']
  atomic_files.write_text(paths[0], '\n\n'.join(map(markdown, blocks)) + '\n')
  title = next((block.text for block in blocks if isinstance(block, Heading)), directory.name)
  body = '\n'.join(map(_html, blocks))
  head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
  atomic_files.write_text(
    paths[1], f'<!doctype html>\n<html><head>{head}</head>\n<body>{body}</body></html>\n'
  )
  return paths


def markdown(block: Block) -> str:
  """A block as `report.md` has it."""
  match block:
    case Heading(text, level):
      return f'{"#" * level} {text}'
    case Text(text):
      return text
    case Bullets(items):
      return '\n'.join(f'- {item}' for item in items)
    case Code(lines):
      return '\n'.join(f'    {line}' for line in lines)
    case Table(header, rows):
      lines = [header, ['---'] * len(header), *rows]
      return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    case Picture(path, caption):
      return f'![{caption}]({path.name})\n\n*{caption}*'


def _html(block: Block) -> str:
  match block:
    case Heading(text, level):
      return f'<h{level}>{_inline(text)}</h{level}>'
    case Text(text):
      return f'<p>{_inline(text)}</p>'
    case Bullets(items):
      return f'<ul>{"".join(f"<li>{_inline(item)}</li>" for item in items)}</ul>'
    case Code(lines):
      return f'<pre>{html.escape(chr(10).join(lines))}</pre>'
    case Table(header, rows):

      def row(tag, cells):
        return ''.join(f'<{tag}>{_inline(cell)}</{tag}>' for cell in cells)

      body = ''.join(f'<tr>{row("td", cells)}</tr>' for cells in rows)
      return f'<table><tr>{row("th", header)}</tr>{body}</table>'
    case Picture(path, caption):
      data = base64.b64encode(_with_palette(path)).decode()
      image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
      return f'<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>'


def _with_palette(path: pathlib.Path) -> bytes:
  """A PNG in 256 colours: plots look the same in them, at a third of the size."""
  import PIL.Image

  small = io.BytesIO()
  with PIL.Image.open(path) as image:
    flat = PIL.Image.alpha_composite(
      PIL.Image.new('RGBA', image.size, 'white'), image.convert('RGBA')
    ).convert('RGB')
    flat.quantize(256, dither=PIL.Image.Dither.NONE).save(small, 'PNG', optimize=True)
  return small.getvalue()


def _inline(text: str) -> str:
  text = html.escape(text, quote=False)
  text = re.sub(r'`([^`]+)`', r'<code>\1</code>', text)
  text = re.sub(r'\*\*([^*]+)\*\*', r'<strong>\1</strong>', text)
  text = re.sub(r'\*([^*]+)\*', r'<em>\1</em>', text)
  return re.sub(r'\[([^]]+)\]\(([^)]+)\)', r'<a href="\2">\1</a>', text)
