"""Real runs, killed again and again: each restart goes on, and nothing of the end is another.

A round is one run in a fresh workdir and a fresh cache: it is started, killed in some phase, and
started again, until it has been killed often enough; then it is left alone to its end. Metrics and
the last checkpoint are compared with those of a run that nobody touched, files with its files.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS = 60
SETTINGS = [
  '--config=configs/smoke.py',
  f'--config.train.num_steps={NUM_STEPS}',
  '--config.train.log_every=1',
  '--config.train.eval_every=30',
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
PATIENCE = 400.0  # seconds for one start; beyond that it hangs


class Scene:
  """A workdir, its cache, and the process that trains in it."""

  def __init__(self, root: pathlib.Path):
    self.workdir, self.cache = root / 'run', root / 'cache'
    self.programs = root.parent / 'programs'  # compiled once for all rounds, or half made by a kill
    self.log = root / 'log'
    root.mkdir(parents=True)

  def command(self, *command: str) -> subprocess.Popen:
    """Starts a command of experiments/ with the scene's cache."""
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'MOE_JAX_CACHE': str(self.cache)}
    env |= {'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(self.programs)}
    with self.log.open('w') as log:
      line = [sys.executable, '-m', *command]
      return subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

  def train(self) -> subprocess.Popen:
    """Starts the run, or goes on with it."""
    return self.command('experiments.train', *SETTINGS, f'--workdir={self.workdir}')

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
    return sorted(
      str(p.relative_to(p.parents[1])) for p in paths if any(m in p.name for m in marks)
    )


def _phases(scene: Scene, rng: random.Random, usual: float) -> dict[str, Callable[[], bool]]:
  """Phase -> whether a start of the run has come so far."""
  done, saved = len(scene.lines()), scene.names('checkpoints')
  begin, moment = time.monotonic(), rng.uniform(0, usual)
  further, plots = done + rng.randint(1, 12), scene.names('plots')

  def training() -> bool:
    return len(scene.lines()) > done

  return {
    'any moment': lambda: time.monotonic() - begin > moment,
    'tokenizer': lambda: scene.cache.is_dir() and any(scene.cache.iterdir()),
    'cache': lambda: any(scene.cache.rglob('*.npy')) or any(scene.cache.rglob('*.bin')),
    'compile': lambda: (scene.workdir / 'config.json').exists() and not training(),
    'step': lambda: len(scene.lines()) >= min(further, NUM_STEPS),
    'save': lambda: training() and bool(scene.names('checkpoints') - saved),
    'evaluation': lambda: len(scene.lines()) >= NUM_STEPS,
    'plots': lambda: bool(scene.names('plots') - plots),
  }


def run(workdir: pathlib.Path, stop: float, seed: int, most: int) -> dict:
  """Kills runs until the time is over, or `most` kills are done.

  Args:
    workdir: scratch; emptied.
    stop: of `time.monotonic`, when no further kill is begun.
    seed: decides moments.
    most: kills.

  Returns:
    counts of kills by phase and signal, rounds, steps done again, and the broken promises.
  """
  shutil.rmtree(workdir, ignore_errors=True)
  rng, broken = random.Random(seed), []
  whole = Scene(workdir / 'unbroken')
  begin = time.monotonic()
  _finish(whole.train(), whole, broken)
  usual = time.monotonic() - begin
  want = (whole.figures(), final_state(whole.workdir))
  if [figures[0] for figures in want[0]] != list(range(1, NUM_STEPS + 1)):
    broken.append('the unbroken run has not written every step')
  kills: collections.Counter = collections.Counter()
  rounds = again = refused = 0
  while kills.total() < most and time.monotonic() < stop and not broken:
    scene = Scene(workdir / f'round{rounds}')
    rounds += 1
    for _ in range(min(rng.randint(4, 10), most - kills.total())):
      if time.monotonic() > stop:
        break
      again += _kill_once(scene, rng, usual, kills, broken)
    refused += _second_run(scene, broken) if rounds % 3 == 1 else 0
    _finish(scene.train(), scene, broken)
    _compare(scene, whole, want, broken)
    _export(scene, rng, kills, broken)
    print(f'round {rounds}: {kills.total()} kills so far', flush=True)
    if not broken:
      shutil.rmtree(scene.workdir.parent)
  print(table(kills))
  print(f'{kills.total()} kills, {rounds} rounds, {again} steps done again after SIGKILL')
  print(f'{refused} second runs on a busy workdir refused')
  counts = {f'{phase}, {name}': count for (phase, name), count in sorted(kills.items())}
  record = {'kills': kills.total(), 'rounds': rounds, 'steps_again': again, 'refused': refused}
  return record | {'by_phase': counts, 'broken': broken}


def _kill_once(scene: Scene, rng: random.Random, usual: float, kills, broken: list[str]) -> int:
  """Starts the run, waits for a phase, ends it. Returns the steps that will be done again."""
  phases = _phases(scene, rng, usual)
  phase = rng.choice(list(phases))
  how = rng.choices(SIGNALS, (6, 2, 2))[0]
  process = scene.train()
  limit = time.monotonic() + PATIENCE
  while process.poll() is None and not phases[phase]():
    if time.monotonic() > limit:
      process.kill()
      broken.append(f'a start hung for {PATIENCE:.0f} s: {_tail(scene)}')
    time.sleep(0.005)
  if process.poll() is not None:
    if process.returncode != 0:
      broken.append(f'a restart ended with status {process.returncode}: {_tail(scene)}')
    return 0
  time.sleep(rng.uniform(0, 0.05))
  process.send_signal(signal.SIGKILL if how == 'SIGKILL' else signal.SIGTERM)
  if how == 'SIGTERM twice':
    time.sleep(rng.uniform(0, 0.3))
    process.send_signal(signal.SIGTERM)
  process.wait(PATIENCE)
  kills[phase, how] += 1
  done, saved = len(scene.lines()), [int(n) for n in scene.names('checkpoints') if n.isdigit()]
  lost = done - max(saved, default=0)
  if how == 'SIGKILL':
    return max(lost, 0)
  # Before Python listens, SIGTERM ends it as any program; from then on it saves and says so.
  if process.returncode not in (0, -signal.SIGTERM):
    broken.append(f'{how} in {phase} ended with status {process.returncode}: {_tail(scene)}')
  elif process.returncode == 0 and done and lost > 0:
    broken.append(f'{how} in {phase} lost {lost} steps: {_tail(scene)}')
  return 0


def _finish(process: subprocess.Popen, scene: Scene, broken: list[str]):
  """Waits for a start that nobody kills."""
  try:
    if process.wait(PATIENCE):
      broken.append(f'{scene.workdir} ended with status {process.returncode}: {_tail(scene)}')
  except subprocess.TimeoutExpired:
    process.kill()
    broken.append(f'{scene.workdir} hung: {_tail(scene)}')


def _second_run(scene: Scene, broken: list[str]) -> int:
  """Starts two runs on one workdir at once: one refuses in a line. Returns 1 if so."""
  first = scene.train()
  second_log = scene.log.with_name('second')
  log, scene.log = scene.log, second_log
  second = scene.train()
  scene.log = log
  statuses = sorted((first.wait(PATIENCE), second.wait(PATIENCE)))
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

  from moe_jax.runs import trained_run
  from moe_jax.training import train_state

  cfg, mesh = trained_run.on_devices_here(trained_run.read_config(workdir))
  with trained_run.reader(workdir) as reader:
    restored = reader.restore(train_state.abstract_state(cfg, mesh))
  leaves = jax.tree_util.tree_leaves_with_path(restored.state)
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def _export(scene: Scene, rng: random.Random, kills, broken: list[str]):
  """Kills an export at a random moment, then lets one end: the same files as an unbroken one."""
  target, plain = scene.workdir.parent / 'exported', scene.workdir.parent / 'plain'
  flags = ('experiments.convert', f'--workdir={scene.workdir}')
  begin = time.monotonic()
  _finish(scene.command(*flags, f'--to_hf={plain}'), scene, broken)
  process = scene.command(*flags, f'--to_hf={target}')
  time.sleep(rng.uniform(0.5, 1.0) * (time.monotonic() - begin))
  process.kill()
  if process.wait() == -signal.SIGKILL:
    kills['export', 'SIGKILL'] += 1
    if not target.exists():  # else it was killed behind its last rename: all files are there
      _finish(scene.command(*flags, f'--to_hf={target}'), scene, broken)
  files = {p.name: p.read_bytes() for p in plain.glob('*')}
  if files != {p.name: p.read_bytes() for p in target.glob('*')}:
    broken.append(f'{target}: other files than an unbroken export')
  beside = [p.name for p in target.parent.iterdir() if p.name.startswith('.exported')]
  if beside:
    broken.append(f'{target}: left behind: {beside}')


def _tail(scene: Scene) -> str:
  return scene.log.read_text()[-400:]


def table(kills: collections.Counter) -> str:
  """Kills by phase and signal."""
  names = sorted({name for _, name in kills})
  lines = ['| killed in | ' + ' | '.join(names) + ' |', '|---|' + '---:|' * len(names)]
  for phase in sorted({phase for phase, _ in kills}):
    lines.append(f'| {phase} | ' + ' | '.join(str(kills[phase, name]) for name in names) + ' |')
  return '\n'.join(lines)
