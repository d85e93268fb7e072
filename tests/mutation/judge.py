"""Runs tests of a mutant in a fork of this process, which has imported the libraries they need.

Third-party libraries take most of the time in which a test file starts; nothing of this repository
is imported before the fork, so each one reads the source as it is then.
"""

import importlib
import inspect
import json
import os
import pathlib
import resource
import signal
import sys
import time
import traceback

import pytest

LIBRARIES = ('jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'matplotlib.pyplot', 'tokenizers')
OPTIONS = ['-n', '0', '-x', '-q', '-p', 'no:cacheprovider']
WALL = 6  # a busy machine gives a process this much less than its CPU time at worst


def preload():
  """Imports what every test file needs."""
  for name in LIBRARIES:
    importlib.import_module(name)


class Nearest:
  """Pytest plugin: tests whose text uses one of `names` come first; `by` is the first to fail."""

  def __init__(self, names: set[str]):
    self.names, self.by, self.passed = names, '', 0

  @pytest.hookimpl(trylast=True)
  def pytest_collection_modifyitems(self, items: list[pytest.Item]):
    items.sort(key=lambda item: not self.names & words(item))

  def pytest_runtest_logreport(self, report: pytest.TestReport):
    if report.failed:
      self.by = self.by or report.nodeid
    elif report.when == 'call' and report.passed:
      self.passed += 1

  def pytest_collectreport(self, report: pytest.CollectReport):
    if report.failed:
      self.by = self.by or report.nodeid


def words(item: pytest.Item) -> set[str]:
  """The names in the code of a test, those of its nested functions and called attributes."""
  function = inspect.unwrap(getattr(item, 'function', None) or (lambda: None))
  found, codes = set(), [function.__code__]
  while codes:
    code = codes.pop()
    found |= {*code.co_names, *code.co_freevars}
    codes += [c for c in code.co_consts if inspect.iscode(c)]
  return found


def run(
  files: list[str], tree: pathlib.Path, names: set[str], seconds: float
) -> tuple[int | None, str, int, float]:
  """(exit code, or None past that much CPU time; the first test that failed; passed; CPU)."""
  result = tree / '.mutation_result'
  result.unlink(missing_ok=True)
  process = os.fork()
  if not process:
    _child(files, tree, names, seconds, result)
  start = time.monotonic()
  while True:
    ended, status, usage = os.wait4(process, os.WNOHANG)
    if ended:
      break
    if time.monotonic() - start > WALL * seconds:
      os.killpg(process, signal.SIGKILL)
      _, status, usage = os.wait4(process, 0)
      break
    time.sleep(0.1)
  cpu = usage.ru_utime + usage.ru_stime
  late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
  found = json.loads(result.read_text()) if result.exists() else {'by': '', 'passed': 0}
  code = None if late else os.waitstatus_to_exitcode(status)
  return code, found['by'], found['passed'], cpu


def _child(files, tree, names, seconds, result):
  """Runs pytest on the tree and never returns."""
  code = 3
  try:
    os.setsid()
    out = os.open(tree / '.mutation_output', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    os.environ['PYTHONPATH'] = str(tree)
    for name in [n for n in sys.modules if n.partition('.')[0] in ('tests', 'moe_jax')]:
      del sys.modules[name]
    root = pathlib.Path(__file__).parents[2]
    sys.path[:] = [str(tree)] + [p for p in sys.path if pathlib.Path(p).resolve() != root]
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    plugin = Nearest(names)
    code = int(pytest.main([*OPTIONS, *files], plugins=[plugin]))
    result.write_text(json.dumps({'by': plugin.by, 'passed': plugin.passed}))
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)
