"""Tables that stand indented in docstrings keep their lines on the site."""

import griffe

SECTIONS = ('Args:', 'Returns:', 'Yields:', 'Raises:', 'Attributes:', 'Example:', 'Examples:')


def fenced(text: str) -> str:
  """A docstring with its indented paragraphs, but for those of its sections, as blocks of code."""
  paragraphs, in_section = [], False
  for paragraph in text.split('\n\n'):
    lines = paragraph.split('\n')
    indented = all(line.startswith('  ') for line in lines)
    if not indented:
      in_section = any(line in SECTIONS for line in lines)
    if indented and not in_section:
      paragraph = f'```text\n{paragraph}\n```'
    paragraphs.append(paragraph)
  return '\n\n'.join(paragraphs)


class Blocks(griffe.Extension):
  """Calls `fenced` on every docstring that is read."""

  def on_object(self, *, obj: griffe.Object, **unused):
    """Changes the docstring of a module, class or function, once."""
    if obj.docstring and not obj.docstring.value.count('```text\n'):
      obj.docstring.value = fenced(obj.docstring.value)
