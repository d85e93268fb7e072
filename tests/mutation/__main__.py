"""Plants small bugs in the library, one at a time, and asks its tests: `python -m tests.mutation`.

Every mutant is written into a copy of the tree; the tests of its module run (the file of the same
name first, then others that import it, those that use the changed function first) until one fails.
A line of JSON per mutant goes to --out; a second call goes on where the first stopped, also after
edits of the library. `equivalent.txt` lists mutants that no test can or need tell from the program,
with the reason, a line 'KEY :: WHY' each. Not part of CI: it takes hours.

`records.jsonl` keeps the records of the last round. `--check` tries nothing, and takes seconds: it
holds both files to the library as it is and prints the round's table.
"""

import argparse
import ast
import collections
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Set

from tests.mutation import judge, mutants

ROOT = pathlib.Path(__file__).parents[2]
EQUIVALENT = pathlib.Path(__file__).parent / 'equivalent.txt'
RECORDS = pathlib.Path(__file__).parent / 'records.jsonl'


def main():
  args = parser().parse_args()
  if args.check:
    sys.exit(check(read(RECORDS), equivalent()))
  rooms = [room for room in args.rooms.split(',') if room]
  found = [m for path in modules(rooms) for m in mutants.of((ROOT / path).read_text(), path)]
  drawn = mutants.sample(found, args.count, args.seed)
  print(f'{len(drawn)} of {len(found)} mutants of {len(modules(rooms))} modules', flush=True)
  out, keys = pathlib.Path(args.out), {m.key for m in found}
  known = {key: record for key, record in read(out).items() if key in keys}
  if args.again:
    wanted = {key for key, record in known.items() if record['result'] in args.again.split(',')}
    drawn = [m for m in found if m.key in wanted - set(equivalent())]
  else:
    drawn = [m for m in drawn if m.key not in known][: max(args.count - len(known), 0)]
  stop = time.monotonic() + 60 * args.minutes
  judge.preload()
  with tempfile.TemporaryDirectory(prefix='moe_jax_mutants_') as folder:
    if 'PYTEST_XDIST_WORKER' not in os.environ:  # compiled programs are shared by all forks
      os.environ |= {
        'PYTEST_XDIST_WORKER': 'gw0',
        'JAX_COMPILATION_CACHE_DIR': f'{folder}/programs',
      }
    tree = copy_of_the_tree(pathlib.Path(folder) / 'tree')
    for mutant in drawn:
      if time.monotonic() > stop:
        break
      known[mutant.key] = record = verdict(mutant, tree, args.timeout, args.files)
      with out.open('a') as file:
        file.write(json.dumps(record) + '\n')
      line = f'{record["result"]:9s}{record["seconds"]:6.0f} s  {mutant.key}  {record["by"]}'
      print(line, flush=True)
    broken = failing_without_a_mutant(known.values(), tree) if args.without else []
  print(table(known.values(), broken, equivalent()))


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  flags = argparse.ArgumentParser(prog='python -m tests.mutation', description=__doc__)
  flags.add_argument('--count', type=int, default=150, help='mutants in all, with those of --out')
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--rooms', default='', help='models,training: those folders alone')
  flags.add_argument('--timeout', type=float, default=120, help='CPU seconds of tests per mutant')
  flags.add_argument('--minutes', type=float, default=1e9, help='begin no mutant after that')
  flags.add_argument('--files', type=int, default=4, help='test files per mutant at most')
  flags.add_argument('--out', default='mutants.jsonl')
  flags.add_argument('--again', default='', help='survived,timeout: try those of --out again')
  flags.add_argument('--without', action='store_true', help='see the killing tests pass without')
  flags.add_argument(
    '--check', action='store_true', help='hold what is kept to the library, no more'
  )
  return flags


def modules(rooms: list[str]) -> list[str]:
  """Modules below moe_jax/, of the rooms named (all, if none is)."""
  paths = sorted(p.relative_to(ROOT) for p in (ROOT / 'moe_jax').rglob('*.py'))
  return [str(p) for p in paths if not rooms or p.parts[1].removesuffix('.py') in rooms]


def read(out: pathlib.Path) -> dict[str, dict]:
  """The last record of every mutant."""
  lines = out.read_text().splitlines() if out.exists() else []
  return {record['mutant']: record for record in map(json.loads, lines)}


def copy_of_the_tree(tree: pathlib.Path) -> pathlib.Path:
  """Every tracked file, and those not yet committed."""
  command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
  for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
    if (ROOT / name).is_file():
      (tree / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, tree / name)
  return tree


def equivalent() -> dict[str, str]:
  """Why a mutant of that key is no bug."""
  lines = EQUIVALENT.read_text().splitlines()
  return {key: why for key, _, why in (line.rpartition(' :: ') for line in lines)}


def check(records: dict[str, dict], known: dict[str, str]) -> int:
  """Prints the table of kept records; 1 where a file says what is no longer so, else 0.

  A record of a mutant that an edit took away is left out, and counted. One whose killing test is
  gone is doubtful, and a line of `equivalent.txt` about no mutant is wrong.

  Args:
    records: kept records by key.
    known: as `equivalent` returns.
  """
  there = real({*records, *known})
  live = [record for key, record in records.items() if key in there]
  gone = sorted({r['by'] for r in live if r['result'] == 'killed' and not exists(r['by'])})
  wrong = [key for key in known if key not in there]
  print(table(live, gone, known))
  print(f'{len(records) - len(live)} of {len(records)} records are of code that is no more')
  for line in [*(f'no such test: {by}' for by in gone), *(f'no such mutant: {k}' for k in wrong)]:
    print(line)
  return 1 if gone or wrong else 0


def real(keys: Set[str]) -> set[str]:
  """Those of the keys that are mutants of the library as it is."""
  found = set()
  for path in sorted({key.partition(' :: ')[0] for key in keys}):
    if (ROOT / path).is_file():
      found |= {mutant.key for mutant in mutants.of((ROOT / path).read_text(), path, keys)}
  return found


def exists(test: str) -> bool:
  """Whether there is a test (or a file of tests) of that name, whatever its parameters."""
  file, _, name = test.partition('::')
  name = name.rpartition('::')[2].partition('[')[0]
  found = (ROOT / file).is_file()
  return found and (not name or f'def {name}(' in (ROOT / file).read_text())


def tests_of(path: str, most: int) -> list[str]:
  """Test files of a module: that of its name, then importers, then those of what imports it.

  At the same distance the nearest folder comes first.
  """
  module = pathlib.PurePath(path)
  own = str(pathlib.PurePath('tests', *module.parts[1:-1], f'test_{module.name}'))
  ordered, seen, new = [own] * (ROOT / own).is_file(), set(), {path}
  while new and len(ordered) < most:
    names = {dotted(one) for one in new}
    seen |= new
    new = {file for file, uses in imports().items() if uses & names} - seen
    tests = [file for file in sorted(new) if pathlib.PurePath(file).name.startswith('test_')]
    shared = [len(os.path.commonpath([own, file])) for file in tests]
    ordered += [file for _, file in sorted(zip(shared, tests), key=lambda f: -f[0])]
  return list(dict.fromkeys(ordered))[:most]


def dotted(path: str) -> str:
  """What a module of this path is called in imports."""
  return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


@functools.cache
def imports() -> dict[str, set[str]]:
  """What every file of the library and of its tests imports."""
  found = {}
  for path in [*(ROOT / 'moe_jax').rglob('*.py'), *(ROOT / 'tests').rglob('*.py')]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    found[str(path.relative_to(ROOT))] = names
  return found


def verdict(mutant: mutants.Mutant, tree: pathlib.Path, timeout: float, files: int) -> dict:
  """Plants one bug, runs tests until one fails, takes the bug out again."""
  path = tree / mutant.path
  source = path.read_text()
  names = mutants.users(source, mutant.line)
  record = {'mutant': mutant.key, 'before': mutant.before, 'after': mutant.after}
  record |= {'result': 'survived', 'by': '', 'passed': 0, 'seconds': 0.0}
  tests = tests_of(mutant.path, files)
  try:
    write(path, mutant.apply(source))
    for group in filter(None, (tests[:1], tests[1:])):
      left = max(timeout - record['seconds'], 1)
      code, by, passed, cpu = judge.run(group, tree, names, left)
      record['passed'] += passed
      record['seconds'] = round(record['seconds'] + cpu, 1)
      if code not in (0, 5):  # 5: every test of the file is slow
        record |= {'result': 'timeout' if code is None else 'killed', 'by': by or group[0]}
        break
  finally:
    write(path, source)
  return record


def write(path: pathlib.Path, source: str):
  """Writes a module and forgets its bytecode, which would count as fresh within a second."""
  path.write_text(source)
  for stale in (path.parent / '__pycache__').glob(f'{path.stem}.*.pyc'):
    stale.unlink()


def failing_without_a_mutant(records, tree: pathlib.Path) -> list[str]:
  """Killing tests that fail on the library as it is: what they killed counts for nothing."""
  killers = sorted({r['by'] for r in records if r['result'] == 'killed' and '::' in r['by']})
  return [name for name in killers if judge.run([name], tree, set(), 600)[0] != 0]


def table(records, broken: list[str], equivalent: dict[str, str]) -> str:
  """Counts by room, and what was not killed in full."""
  rooms: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  lines = []
  for record in records:
    result = 'doubtful' if record['by'] in broken else record['result']
    why = equivalent.get(record['mutant'], '') if record['result'] != 'killed' else ''
    result = 'equivalent' if why else result
    room = record['mutant'].partition(' :: ')[0].split('/')[1]
    for name in (room, 'all'):
      rooms[name][result] += 1
    if result != 'killed':
      change = f'`{record["before"]}` -> `{record["after"]}`'
      lines.append(f'{result} {record["mutant"]} {change} {why}')
  results = ('killed', 'survived', 'timeout', 'equivalent', 'doubtful')
  rows = ['| room | ' + ' | '.join(results) + ' |', '|---|' + '---:|' * len(results)]
  rows += [f'| {r} | ' + ' | '.join(str(c[k]) for k in results) + ' |' for r, c in rooms.items()]
  return '\n'.join(rows + lines)


if __name__ == '__main__':
  main()
