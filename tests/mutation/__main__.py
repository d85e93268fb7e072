"""Plants small bugs in the library, one at a time, and asks its tests: `python -m tests.mutation`.

Every mutant is written into a copy of the tree; the tests of its module run (the file of the same
name first, then others that import it) until one fails. A line of JSON per mutant goes to --out;
a second call goes on where the first stopped. Not part of CI: it takes hours.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from tests.mutation import mutants

ROOT = pathlib.Path(__file__).parents[2]
PYTEST = [sys.executable, '-m', 'pytest', '-n', '0', '-x', '-q', '-rfE', '-p', 'no:cacheprovider']


def main():
  args = parser().parse_args()
  rooms = [room for room in args.rooms.split(',') if room]
  found = [m for path in modules(rooms) for m in mutants.of((ROOT / path).read_text(), path)]
  drawn = mutants.sample(found, args.count, args.seed)
  print(f'{len(drawn)} of {len(found)} mutants of {len(modules(rooms))} modules')
  out = pathlib.Path(args.out)
  known = read(out)
  if args.again:
    drawn = [m for m in found if known.get(m.key, {}).get('result') in args.again.split(',')]
  else:
    drawn = [m for m in drawn if m.key not in known]
  stop = time.monotonic() + 60 * args.minutes
  with tempfile.TemporaryDirectory(prefix='moe_jax_mutants_') as folder:
    tree = copy_of_the_tree(pathlib.Path(folder) / 'tree')
    for mutant in drawn:
      if time.monotonic() > stop:
        break
      known[mutant.key] = record = judge(mutant, tree, args.timeout, args.files)
      with out.open('a') as file:
        file.write(json.dumps(record) + '\n')
      print(f'{record["result"]:9s}{record["seconds"]:6.0f} s  {mutant.key}  {record["by"]}')
    broken = failing_without_a_mutant(known.values(), tree) if args.check else []
  print(table(known.values(), broken))


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  flags = argparse.ArgumentParser(prog='python -m tests.mutation', description=__doc__)
  flags.add_argument('--count', type=int, default=150, help='mutants to draw')
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--rooms', default='', help='models,training: those folders alone')
  flags.add_argument('--timeout', type=float, default=300, help='seconds of tests per mutant')
  flags.add_argument('--minutes', type=float, default=1e9, help='begin no mutant after that')
  flags.add_argument('--files', type=int, default=4, help='test files per mutant at most')
  flags.add_argument('--out', default='mutants.jsonl')
  flags.add_argument('--again', default='', help='survived,timeout: try those of --out again')
  flags.add_argument('--check', action='store_true', help='see the killing tests pass without')
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


def tests_of(path: str, most: int) -> list[str]:
  """Test files of a module: the one of its own name, then importers, nearest folder first."""
  module = pathlib.PurePath(path)
  own = pathlib.PurePath('tests', *module.parts[1:-1], f'test_{module.name}')
  package = '.'.join(module.parts[:-1])
  imports = re.compile(rf'^from {re.escape(package)} import {module.stem}\b', re.MULTILINE)
  files = (p for p in (ROOT / 'tests').rglob('test_*.py') if imports.search(p.read_text()))
  others = sorted(p.relative_to(ROOT) for p in files)
  near = [p for p in others if p.parent == pathlib.Path(own.parent)]
  ordered = [pathlib.Path(own)] * (ROOT / own).is_file() + near + others
  return [str(p) for p in dict.fromkeys(ordered)][:most]


def judge(mutant: mutants.Mutant, tree: pathlib.Path, timeout: float, files: int) -> dict:
  """Plants one bug, runs tests until one fails, takes the bug out again."""
  start = time.monotonic()
  path = tree / mutant.path
  source = path.read_text()
  record = {'mutant': mutant.key, 'before': mutant.before, 'after': mutant.after}
  record |= {'source': source.splitlines()[mutant.line - 1].strip(), 'result': 'survived', 'by': ''}
  try:
    write(path, mutant.apply(source))
    for name in tests_of(mutant.path, files):
      left = timeout - (time.monotonic() - start)
      code, by = run_tests([name], tree, left)
      if code not in (0, 5):  # 5: every test of the file is slow
        record |= {'result': 'timeout' if code is None else 'killed', 'by': by or name}
        break
  finally:
    write(path, source)
  return record | {'seconds': round(time.monotonic() - start, 1)}


def write(path: pathlib.Path, source: str):
  """Writes a module and forgets its bytecode, which would count as fresh within a second."""
  path.write_text(source)
  for stale in (path.parent / '__pycache__').glob(f'{path.stem}.*.pyc'):
    stale.unlink()


def run_tests(names: list[str], tree: pathlib.Path, timeout: float) -> tuple[int | None, str]:
  """(exit code, or None past the limit; the first test that failed)."""
  process = subprocess.Popen(
    [*PYTEST, *names],
    cwd=tree,
    env=os.environ | {'PYTHONPATH': str(tree)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  try:
    out, _ = process.communicate(timeout=max(timeout, 1))
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return None, ''
  failed = re.findall(r'^(?:FAILED|ERROR) (\S+)', out, re.MULTILINE)
  return process.returncode, failed[0] if failed else ''


def failing_without_a_mutant(records, tree: pathlib.Path) -> list[str]:
  """Killing tests that fail on the library as it is: what they killed counts for nothing."""
  killers = sorted({r['by'] for r in records if r['result'] == 'killed' and '::' in r['by']})
  return [name for name in killers if run_tests([name], tree, 600)[0] != 0]


def table(records, broken: list[str]) -> str:
  """Counts by room, and the survivors in full."""
  rooms: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for record in records:
    result = 'doubtful' if record['by'] in broken else record['result']
    for room in (record['mutant'].split('/')[1].split(':')[0], 'all'):
      rooms[room][result] += 1
  results = ('killed', 'survived', 'timeout', 'doubtful')
  rows = ['| room | ' + ' | '.join(results) + ' |', '|---|' + '---:|' * len(results)]
  rows += [f'| {r} | ' + ' | '.join(str(c[k]) for k in results) + ' |' for r, c in rooms.items()]
  for record in records:
    if record['result'] != 'killed':
      change = f'`{record["before"]}` -> `{record["after"]}`'
      rows.append(f'{record["result"]} {record["mutant"]} {change} in `{record["source"]}`')
  return '\n'.join(rows)


if __name__ == '__main__':
  main()
