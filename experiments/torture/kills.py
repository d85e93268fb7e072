"""Real runs, killed again and again: each restart goes on, and nothing of the end is another.

A round is one run in a fresh workdir and a fresh cache: it is started, killed in some phase, and
started again, until it has been killed often enough; then it is left alone to its end. Metrics and
the last checkpoint are compared with those of a run that nobody touched, files with its files.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS, EVAL_EVERY = 60, 30
SETTINGS = [
  '--config=configs/smoke.py',
  f'--config.train.num_steps={NUM_STEPS}',
  '--config.train.log_every=1',
  f'--config.train.eval_every={EVAL_EVERY}',
  '--config.train.routing_every=20',
  '--config.train.sample_prompt=',
  '--config.checkpoint.save_every=8',
  '--config.data.tokenizer=bpe',
  '--config.data.synthetic_documents=60',
  '--config.model.max_seq_len=32',
  '--config.model.num_layers=2',
]
FIGURES = ('step', 'loss', 'lr', 'grad_norm', 'max_vio')
SIGNALS = ('SIGKILL', 'SIGTERM', 'SIGTERM twice')
PATIENCE = 1200.0  # seconds for one start, on a busy machine; beyond that it hangs


class Scene:
  """A workdir, its cache, and the process that trains in it."""

  def __init__(self, root: pathlib.Path, settings: Sequence[str] = SETTINGS):
    self.settings = settings
    self.workdir, self.cache = root / 'run', root / 'cache'
    self.programs = root.parent / 'programs'  # compiled once for all rounds, or half made by a kill
    self.log = root / 'log'
    root.mkdir(parents=True, exist_ok=True)

  def command(self, *command: str) -> subprocess.Popen:
    """Starts a command of experiments/ with the scene's cache."""
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOE_JAX_CACHE': str(self.cache)}
    env |= {'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(self.programs)}
    env |= {'PYTHONUNBUFFERED': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    with self.log.open('w') as log:
      line = [sys.executable, '-m', *command]
      return subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

  def train(self) -> subprocess.Popen:
    """Starts the run, or goes on with it."""
    return self.command('experiments.train', *self.settings, f'--workdir={self.workdir}')

  def lines(self) -> list[str]:
    """The lines of metrics.jsonl."""
    path = self.workdir / 'metrics.jsonl'
    return path.read_text().splitlines() if path.exists() else []

  def figures(self) -> list[tuple]:
    """Everything about every step that does not depend on the clock, with all digits."""
    parsed = [json.loads(line) for line in self.lines()]
    return [tuple(p[key] for key in FIGURES) for p in parsed]

  def names(self, folder: str) -> set[str]:
    """Entries of a folder of the workdir."""
    path = self.workdir / folder
    return {p.name for p in path.iterdir()} if path.is_dir() else set()

  def files(self) -> collections.Counter:
    """Files of workdir and cache by their folder; names that hold a process's number aside."""
    found: collections.Counter = collections.Counter()
    for root in (self.workdir, self.cache):
      for path in root.rglob('*'):
        inside = path.relative_to(root.parent)
        if path.is_file() and inside.parts[1] not in ('tensorboard', 'jax', 'checkpoints'):
          found[str(inside)] += 1
    return found

  def temporary(self) -> list[str]:
    """What an unfinished write leaves behind."""
    marks = ('.tmp', 'orbax-checkpoint-tmp', '.partial')
    paths = [p for root in (self.workdir, self.cache) for p in root.rglob('*')]
    left = [p for p in paths if any(m in p.name for m in marks)] + [*self.cache.glob('*/.*')]
    return sorted(str(p.relative_to(p.parents[1])) for p in left)


class Phase(NamedTuple):
  """A part of a start, as its files show it."""

  begun: Callable[[], bool]
  over: Callable[[], bool]
  usual: float  # seconds; a kill falls at most so long behind the beginning


def _phases(scene: Scene, rng: random.Random, usual: float) -> dict[str, Phase]:
  """Phases of the start that comes next; the files of tokenizer, cache and programs are taken away.

  Args:
    scene: of the run.
    rng: decides how far a step goes.
    usual: seconds of a whole run.
  """
  begin, done, saved = time.time(), len(scene.lines()), scene.names('checkpoints')
  further = min(done + rng.randint(1, 12), NUM_STEPS)
  evaluated = EVAL_EVERY * (done // EVAL_EVERY + 1)

  def written(name: str) -> bool:
    path = scene.workdir / name
    return path.exists() and path.stat().st_mtime > begin

  def lines(number: int) -> Callable[[], bool]:
    return lambda: len(scene.lines()) >= number

  def building(folder: str) -> Callable[[], bool]:
    return lambda: any(p.name.startswith('.') for p in (scene.cache / folder).glob('*'))

  def built(folder: str) -> Callable[[], bool]:
    return lambda: any(not p.name.startswith('.') for p in (scene.cache / folder).glob('*'))

  def saving() -> bool:
    return bool(scene.names('checkpoints') - saved)

  def was_saved() -> bool:
    return any(name.isdigit() for name in scene.names('checkpoints') - saved)

  return {
    'any moment': Phase(lambda: True, lambda: False, usual),
    'tokenizer': Phase(building('tokenizers'), built('tokenizers'), 0.03),
    'cache': Phase(building('corpora'), built('corpora'), 0.03),
    'compile': Phase(lambda: 'parameters=' in scene.log.read_text(), lines(done + 1), 8.0),
    'step': Phase(lines(further), lambda: False, 0.1),
    'save': Phase(saving, was_saved, 0.1),
    'evaluation': Phase(lines(evaluated), lines(evaluated + 1), 2.0),
    'plots': Phase(lambda: written('evaluation.json'), lambda: False, 6.0),
  }


def _plan(rng: random.Random, most: int) -> list[str]:
  """The phases in which a run is killed, one start after the other; those of its end come last."""
  early = ['tokenizer', 'cache', 'compile', 'step', 'save', 'evaluation', 'any moment']
  drawn = [rng.choice(early) for _ in range(rng.randint(3, 6))] + ['tokenizer', 'cache', 'compile']
  rng.shuffle(drawn)
  return (drawn + ['plots'] * rng.randint(1, 2))[:most]


def _take_away(scene: Scene, phase: str, rng: random.Random):
  """Deletes what a start would find done already, so that the phase comes at all."""
  if phase == 'tokenizer':
    shutil.rmtree(scene.cache, ignore_errors=True)
  elif phase == 'cache':
    shutil.rmtree(scene.cache / 'corpora', ignore_errors=True)
  elif phase == 'compile' and scene.programs.exists():
    programs = sorted(scene.programs.iterdir())
    for path in rng.sample(programs, len(programs) // 4):
      path.unlink(missing_ok=True)


def run(workdir: pathlib.Path, stop: float, seed: int, most: int) -> dict:
  """Kills runs until the time is over, or `most` kills are done.

  A line per round is added to rounds.jsonl, and what an earlier command with this workdir did
  counts: its rounds are not done again. Delete the workdir to begin anew.

  Args:
    workdir: scratch.
    stop: of `time.monotonic`, when no further kill is begun.
    seed: decides moments.
    most: kills.

  Returns:
    counts of kills by phase and signal, rounds, steps done again, and the broken promises.
  """
  path = workdir / 'rounds.jsonl'
  records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  whole, broken = Scene(workdir / 'unbroken'), []
  begin = time.monotonic()
  if not (whole.workdir / 'plots').is_dir() or not (whole.workdir.parent / 'plain').is_dir():
    _finish(whole.train(), whole, broken)
    _finish(_convert(whole, 'plain'), whole, broken)
  usual = (time.monotonic() - begin) / 3  # most of it compiled, and the others need not
  want = (whole.figures(), final_state(whole.workdir))
  if [figures[0] for figures in want[0]] != list(range(1, NUM_STEPS + 1)):
    broken.append('the unbroken run has not written every step')
  while (total := _total(records)['kills']) < most and time.monotonic() < stop and not broken:
    scene = Scene(workdir / f'round{len(records)}')
    records.append(_round(scene, whole, want, f'{seed}-{len(records)}', usual, most - total, stop))
    broken += records[-1]['broken']
    with path.open('a') as lines:
      lines.write(json.dumps(records[-1]) + '\n')
    print(f'round {len(records)}: {_total(records)["kills"]} kills so far', flush=True)
  record = _total(records)
  print(table(record['by_phase']))
  print(
    f'{record["kills"]} kills, {record["rounds"]} rounds, {record["steps_again"]} steps done again '
    f'after SIGKILL, {record["refused"]} second runs on a busy workdir refused'
  )
  return record | {'broken': broken}


def _round(
  scene: Scene, whole: Scene, want: tuple, seed: str, usual: float, most: int, stop: float
) -> dict:
  """One run, killed again and again, then complete and compared. Returns its record."""
  rng, broken, again = random.Random(seed), [], 0
  kills: collections.Counter = collections.Counter()
  for phase in _plan(rng, most):
    if time.monotonic() > stop or broken:
      break
    again += _kill_once(scene, phase, rng, usual, kills, broken)
  refused = _second_run(scene, broken) if rng.random() < 0.2 else 0
  _finish(scene.train(), scene, broken)
  _compare(scene, whole, want, broken)
  _export(scene, whole, rng, kills, broken)
  if not broken:
    shutil.rmtree(scene.workdir.parent)
  by_phase = {f'{phase}, {name}': count for (phase, name), count in sorted(kills.items())}
  return {'by_phase': by_phase, 'steps_again': again, 'refused': refused, 'broken': broken}


def _total(records: Sequence[Mapping]) -> dict:
  """Rounds added up."""
  by_phase: collections.Counter = collections.Counter()
  for record in records:
    by_phase.update(record['by_phase'])
  sums = {key: sum(record[key] for record in records) for key in ('steps_again', 'refused')}
  return {
    'kills': by_phase.total(),
    'rounds': len(records),
    **sums,
    'by_phase': dict(sorted(by_phase.items())),
  }


def _kill_once(
  scene: Scene, phase: str, rng: random.Random, usual: float, kills, broken: list[str]
) -> int:
  """Starts the run, waits for a phase, ends it. Returns the steps that will be done again."""
  how = rng.choices(SIGNALS, (8, 1, 1))[0]
  _take_away(scene, phase, rng)
  watched = _phases(scene, rng, usual)[phase]
  process = scene.train()
  if not wait(process, watched, rng.uniform(0, watched.usual)):
    process.kill()
    broken.append(f'a start hung for {PATIENCE:.0f} s: {_tail(scene)}')
  if process.poll() is not None:
    if process.returncode != 0:
      broken.append(f'a restart ended with status {process.returncode}: {_tail(scene)}')
    return 0
  process.send_signal(signal.SIGKILL if how == 'SIGKILL' else signal.SIGTERM)
  where = 'any moment' if watched.over() else phase
  if how == 'SIGTERM twice':
    time.sleep(rng.uniform(0, 0.3))
    process.send_signal(signal.SIGTERM)
  _end(process)
  kills[where, how] += 1
  done, saved = len(scene.lines()), [int(n) for n in scene.names('checkpoints') if n.isdigit()]
  lost = done - max(saved, default=0)
  if how == 'SIGKILL':
    return max(lost, 0)
  # Before Python listens, SIGTERM ends it as any program; from then on it saves and says so.
  if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
    broken.append(f'{how} in {phase} ended with status {process.returncode}: {_tail(scene)}')
  elif process.returncode != -signal.SIGTERM and done and lost > 0:
    broken.append(f'{how} in {phase} lost {lost} steps: {_tail(scene)}')
  return 0


def wait(process: subprocess.Popen, phase: Phase, delay: float = 0.0) -> bool:
  """Waits until `delay` seconds after a phase's beginning, its end, or the process's own.

  Returns:
    False if nothing of that came in PATIENCE seconds.
  """
  limit, moment = time.monotonic() + PATIENCE, math.inf
  while process.poll() is None and time.monotonic() < min(moment, limit):
    if moment == math.inf and phase.begun():
      moment = time.monotonic() + delay
    if phase.over():
      break
    time.sleep(0.002)
  return time.monotonic() < limit


def _end(process: subprocess.Popen) -> int:
  """Waits for a process's end, which is made after PATIENCE seconds. Returns its status."""
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(PATIENCE)
  process.kill()
  return process.wait()


def _finish(process: subprocess.Popen, scene: Scene, broken: list[str]):
  """Waits for a start that nobody kills."""
  status = _end(process)
  if status:
    hung = f' (it hung for {PATIENCE:.0f} s)' if status == -signal.SIGKILL else ''
    broken.append(f'{scene.workdir} ended with status {status}{hung}: {_tail(scene)}')


def _second_run(scene: Scene, broken: list[str]) -> int:
  """Starts two runs on one workdir at once: one refuses in a line. Returns 1 if so."""
  first = scene.train()
  second_log = scene.log.with_name('second')
  log, scene.log = scene.log, second_log
  second = scene.train()
  scene.log = log
  statuses = sorted((_end(first), _end(second)))
  text = log.read_text() + second_log.read_text()
  if statuses == [0, 0]:
    return 0  # one had ended before the other began
  if statuses != [0, 2] or 'error:' not in text or 'Traceback' in text:
    broken.append(f'two runs on one workdir ended with {statuses}: {text[-600:]}')
  return 1


def _compare(scene: Scene, whole: Scene, want: tuple, broken: list[str]):
  """Metrics and the last state bit by bit; files by their names."""
  figures, state = want
  if scene.figures() != figures:
    wrong = sum(a != b for a, b in zip(scene.figures(), figures))
    broken.append(f'{scene.workdir}: {wrong} of {len(scene.lines())} steps have other metrics')
  found = final_state(scene.workdir)
  different = [name for name in state if found.get(name) != state[name]]
  if different or found.keys() != state.keys():
    broken.append(f'{scene.workdir}: {len(different)} arrays of the last state are others')
  if scene.temporary():
    broken.append(f'{scene.workdir}: left behind: {scene.temporary()[:5]}')
  more = scene.files() - whole.files()
  if more:
    broken.append(f'{scene.workdir}: {len(more)} files that the unbroken run has not: {more}')


def final_state(workdir: pathlib.Path) -> dict[str, bytes]:
  """Every array of the newest checkpoint, optimizer and router state included, as bytes."""
  import jax
  import numpy as np

  from moe_jax.config import parse
  from moe_jax.runs import trained_run
  from moe_jax.training import train_state

  def abstract(meta):
    cfg, mesh = trained_run.on_devices_here(parse.from_record(meta['config']))
    return train_state.abstract_state(cfg, mesh)

  with trained_run.reader(workdir) as reader:
    restored = reader.restore(abstract)
  leaves = jax.tree_util.tree_leaves_with_path(restored.state)
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def _convert(scene: Scene, target: str) -> subprocess.Popen:
  """Starts the export of a scene's run to a folder beside it."""
  flags = (f'--workdir={scene.workdir}', f'--to_hf={scene.workdir.parent / target}')
  return scene.command('experiments.convert', *flags)


def _export(scene: Scene, whole: Scene, rng: random.Random, kills, broken: list[str]):
  """Kills an export, twice, then lets one end: the files are those of the unbroken run's export."""
  target, plain = (one.workdir.parent / name for one, name in ((scene, 'out'), (whole, 'plain')))
  parts = Phase(lambda: any(target.parent.glob('.out*')), target.exists, 0.5)
  for _ in range(2):
    process = _convert(scene, 'out')
    if not wait(process, parts, rng.uniform(0, parts.usual)):
      broken.append(f'an export hung for {PATIENCE:.0f} s: {_tail(scene)}')
    process.kill()
    if process.wait() == -signal.SIGKILL:
      kills['export', 'SIGKILL'] += 1
    if target.exists():  # else it was killed before its last rename
      break
  else:
    _finish(_convert(scene, 'out'), scene, broken)
  files = {p.name: p.read_bytes() for p in plain.glob('*')}
  if not files or files != {p.name: p.read_bytes() for p in target.glob('*')}:
    broken.append(f'{target}: other files than an unbroken export')
  beside = [p.name for p in target.parent.iterdir() if p.name.startswith('.out')]
  if beside:
    broken.append(f'{target}: left behind: {beside}')


def _tail(scene: Scene) -> str:
  return scene.log.read_text()[-400:]


def table(by_phase: Mapping[str, int]) -> str:
  """Kills by phase and signal, given by 'phase, signal'."""
  counts = {tuple(key.split(', ')): count for key, count in by_phase.items()}
  names = sorted({name for _, name in counts})
  lines = ['| killed in | ' + ' | '.join(names) + ' |', '|---|' + '---:|' * len(names)]
  for phase in sorted({phase for phase, _ in counts}):
    row = ' | '.join(str(counts.get((phase, name), 0)) for name in names)
    lines.append(f'| {phase} | {row} |')
  return '\n'.join(lines)
