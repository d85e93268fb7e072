"""What is changed, and what is left alone."""

import ast
import pathlib

from tests.mutation import __main__ as command
from tests.mutation import mutants

SOURCE = '''"""At most 3."""
import jax
from jax.numpy import sum as g
LIMIT: int | None = 4


def f(x: int | float = 1, *, on=True) -> int | None:
  """Adds 5."""
  if not on and (x) < -7:
    raise ValueError(f'{x + 6} is more than ' + 'wanted')
  print(x - 8)
  g(x, jax.lax.stop_gradient(LIMIT), axis=9)
  return min(x * (2), 3.5)
'''


def test_operators_constants_calls_and_statements_are_changed():
  found = mutants.of(SOURCE, 'moe_jax/a.py')
  changed = {(m.before, m.after) for m in found}
  assert {('4', '5'), ('True', 'False'), ('and', 'or'), ('<', '<='), ('-7', '(7)')} <= changed
  assert {('not on', '(on)'), ('9', '10'), ('*', '/'), ('min', 'max'), ('3.5', '7.0')} <= changed
  assert ('jax.lax.stop_gradient(LIMIT)', '(LIMIT)') in changed
  assert ('x, jax.lax.stop_gradient(LIMIT)', 'jax.lax.stop_gradient(LIMIT), x') in changed
  assert ('g(x, jax.lax.stop_gradient(LIMIT), axis=9)', 'pass') in changed


def test_docstrings_messages_and_annotations_are_not():
  found = mutants.of(SOURCE, 'moe_jax/a.py')
  assert not {m.before for m in found} & {'3', '5', '6', '8', '|', '+', 'print(x - 8)'}


def test_every_mutant_is_another_program_with_a_key_of_its_own():
  source = pathlib.Path(mutants.__file__).read_text()
  found = mutants.of(source, 'x.py')
  assert len(found) > 10
  for mutant in found:
    assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
  assert len({m.key for m in found}) == len(found)
  assert mutants.sample(found, 20, 1)[:10] == mutants.sample(found, 10, 1)


def test_keys_and_the_draw_survive_edits_elsewhere():
  found, edited = mutants.of(SOURCE, 'a.py'), mutants.of('N = 1\n' + SOURCE, 'a.py')
  assert [m.key for m in found] == [m.key for m in edited][1:]
  drawn = [m.key for m in mutants.sample(edited, len(edited), 0) if not m.key.endswith(' N = 1')]
  assert drawn == [m.key for m in mutants.sample(found, len(found), 0)]
  assert [m.key for m in mutants.of('x = 1\nx = 1\n', 'a.py')] == [
    'a.py :: constant@4 :: x = 1',
    'a.py :: constant@4 :: x = 1 #2',
  ]


def test_what_is_listed_as_equivalent_is_a_mutant_of_the_library():
  keys = command.equivalent().keys()
  assert keys and keys - command.real(keys) == set()


def test_kept_records_are_held_to_the_library(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(command, 'ROOT', tmp_path)
  (tmp_path / 'moe_jax/data').mkdir(parents=True)
  (tmp_path / 'moe_jax/data/a.py').write_text('x = 1\ny = 2\n')
  (tmp_path / 'test_a.py').write_text('def test_x():\n  pass\n')

  def record(line, result, by=''):
    key = f'moe_jax/data/a.py :: constant@4 :: {line}'
    return key, {'mutant': key, 'before': '1', 'after': '2', 'by': by, 'result': result}

  killed, survived = record('x = 1', 'killed', 'test_a.py::test_x[3]'), record('y = 2', 'survived')
  away = record('z = 3', 'survived')
  known = {survived[0]: 'of no weight'}
  assert command.check(dict([killed, survived, away]), known) == 0
  said = capsys.readouterr().out
  assert '| all | 1 | 0 | 0 | 1 | 0 |' in said and '1 of 3 records are of code that is no' in said
  assert command.check(dict([killed]), {away[0]: 'of no weight'}) == 1
  assert f'no such mutant: {away[0]}' in capsys.readouterr().out
  assert command.check(dict([record('x = 1', 'killed', 'test_a.py::test_y')]), {}) == 1
  assert '| all | 0 | 0 | 0 | 0 | 1 |' in capsys.readouterr().out


def test_the_functions_that_use_a_line():
  source = 'LIMIT = 3\ndef a():\n  return LIMIT\ndef b():\n  return a()\ndef c():\n  return 1\n'
  assert mutants.users(source, 1) == {'LIMIT', 'a', 'b'}
  assert mutants.users(source, 7) == {'c'}


def test_the_table_counts_a_listed_survivor_as_equivalent():
  records = [
    {'mutant': 'moe_jax/data/a.py :: x', 'before': '1', 'after': '2', 'by': by, 'result': result}
    for by, result in (('t', 'killed'), ('', 'survived'), ('u', 'killed'))
  ]
  text = command.table(records, ['u'], {'moe_jax/data/a.py :: x': 'of no weight'})
  assert '| all | 1 | 0 | 0 | 1 | 1 |' in text
  assert 'equivalent moe_jax/data/a.py :: x `1` -> `2` of no weight' in text
