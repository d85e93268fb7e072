"""tests/ has the rooms of moe_jax/: a module moe_jax/a/b.py is tested in tests/a/test_b.py."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
LEAST = 0.9  # of the modules with a test of their own name in their own room


def modules() -> list[pathlib.PurePath]:
  """Modules below moe_jax/, `__init__` left out."""
  library = ROOT / 'moe_jax'
  found = (path.relative_to(library) for path in sorted(library.rglob('*.py')))
  return [path for path in found if path.name != '__init__.py']


def without_a_test(paths: list[pathlib.PurePath], tests: pathlib.Path) -> list[str]:
  """The modules that have no test file of their own name in their own room."""
  return [str(path) for path in paths if not (tests / path.parent / f'test_{path.name}').is_file()]


def test_modules_have_a_test_of_their_own_name():
  found = modules()
  missing = without_a_test(found, ROOT / 'tests')
  share = 1 - len(missing) / len(found)
  assert share >= LEAST, f'{share:.1%} of {len(found)} modules; without one: {", ".join(missing)}'


def test_another_rooms_test_does_not_count(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a/test_x.py').touch()
  paths = [pathlib.PurePath('a/x.py'), pathlib.PurePath('b/x.py'), pathlib.PurePath('x.py')]
  assert without_a_test(paths, tmp_path) == ['b/x.py', 'x.py']
