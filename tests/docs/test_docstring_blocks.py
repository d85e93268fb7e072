"""Docstrings as the reference shows them; needs the extra `docs`."""

import pytest

pytest.importorskip('griffe')

from docs import docstring_blocks


def test_indented_paragraphs_keep_their_lines_but_for_those_of_sections():
  text = 'First.\n\nLetters:\n\n  B batch\n  L length\n\nArgs:\n  x: a\n\n  more of x'
  want = 'First.\n\nLetters:\n\n```text\n  B batch\n  L length\n```\n\nArgs:\n  x: a\n\n  more of x'
  assert docstring_blocks.fenced(text) == want
