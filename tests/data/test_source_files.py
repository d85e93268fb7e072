import pathlib

import pytest

from moe_jax.data import source_files


@pytest.fixture
def tree(tmp_path, monkeypatch):
  names = ('a,b.txt', 'a.txt', 'x[1]/c.txt', 'x[1]/d,e/f.jsonl', 'x1/no.txt', 'y/.h/z.txt')
  for name in (*names, 'y/g.jsonl.gz', 'y/k.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  monkeypatch.chdir(tmp_path)


def names(path: str, *suffixes: str) -> list[str]:
  return [name for name, _ in source_files.named(path, 'config.data', 'path', suffixes)]


def test_what_exists_is_meant_by_its_whole_name(tree):
  assert source_files.split('a,b.txt, a.txt') == ['a,b.txt', 'a.txt']
  assert source_files.split('a, c ,') == ['a', 'c']
  assert names('a,b.txt,a.txt') == ['a,b.txt', 'a.txt']
  assert names('x[1]/*.txt') == ['c.txt'] and names('x[1]/c.txt') == ['c.txt']
  assert names('x[1]/d,e/*.jsonl, a.txt') == ['f.jsonl', 'a.txt']
  assert names('x[12]/*.txt') == ['x1/no.txt']  # no such directory: a pattern


def test_a_directory_is_the_files_that_a_source_reads(tree):
  assert names('y') == ['g.jsonl.gz', 'k.txt']
  assert names('y', '.jsonl') == ['g.jsonl.gz']
  assert names('x[1]') == ['c.txt', 'd,e/f.jsonl']


def test_stems_and_stamps(tree):
  assert [source_files.stem(pathlib.Path(n)) for n in ('a.b.jsonl.gz', 'a.jsonl')] == ['a.b', 'a']
  before = source_files.stamp('y')
  assert len(before) == 3 and source_files.stamp('nowhere') == []
  pathlib.Path('y/k.txt').write_text('longer')
  assert source_files.stamp('y') != before
