"""Starts the train command as several real processes on this machine, with virtual CPU devices.

Compiling without optimisation is a third of the time; the programs are tiny.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

from tests import compile_flags

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 240
# What gloo's threads print on connecting, word by word and at the same time.
GLOO = re.compile(
  r'\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d|\s'
)
# One MoE layer of the smoke page on few documents.
SETTINGS = {
  'model.num_layers': 1,
  'model.num_dense_layers': 0,
  'model.max_seq_len': 32,
  'model.moe.expert_bias.update_rule': 'sign',
  'data.synthetic_documents': 40,
  'data.heldout_fraction': 0.1,
  'optim.warmup_steps': 0,
  'train.num_steps': 6,
  'train.log_every': 1,
  'train.routing_every': 0,
  'train.sample_prompt': '',
  'checkpoint.save_every': 3,
}


def environment(cache: pathlib.Path, **variables: str) -> dict[str, str]:
  given = {'JAX_PLATFORMS': 'cpu', 'MOE_JAX_CACHE': str(cache), 'XLA_FLAGS': compile_flags.FLAGS}
  return os.environ | given | variables


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('', 0))
    return s.getsockname()[1]


def start(
  workdir: pathlib.Path,
  cache: pathlib.Path,
  num_processes: int,
  num_devices: int,
  *flags: str,
  settings: dict | None = None,
  only: range | None = None,
  module: str = 'experiments.train',
  page: str = 'configs/smoke.py',
) -> list[subprocess.Popen]:
  """One process per number (or those of `only`), each with `num_devices` devices."""
  values = (SETTINGS if page == 'configs/smoke.py' else {}) | (settings or {})
  env = environment(cache, JAX_NUM_CPU_DEVICES=str(num_devices))
  command = [sys.executable, '-m', module, f'--config={page}']
  command += [f'--config.{key}={value}' for key, value in values.items()]
  command += [f'--workdir={workdir}', f'--num_processes={num_processes}', '--heartbeat_timeout=20']
  command += [f'--coordinator=127.0.0.1:{free_port()}', *flags]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return [
    subprocess.Popen([*command, f'--process_id={i}'], cwd=ROOT, env=env, **pipes)
    for i in only or range(num_processes)
  ]


def join(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """(exit status, stdout, stderr) of each; empty lines and gloo's chatter are left out."""
  found, deadline = [], time.monotonic() + TIMEOUT
  try:
    for process in processes:
      out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
      lines = [line for line in out.splitlines() if GLOO.sub('', line)]
      found.append((process.returncode, '\n'.join(lines), err))
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        process.communicate()
  return found


def run(*args, **kwargs) -> list[str]:
  """Starts all, waits for all; returns what each said."""
  found = join(start(*args, **kwargs))
  for number, (status, out, err) in enumerate(found):
    assert status == 0, f'process {number}: {out}\n{err}'
  return [out for _, out, _ in found]


def wait_for_step(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]):
  deadline = time.monotonic() + TIMEOUT
  while len(figures(workdir)) < step:
    assert all(p.poll() is None for p in processes), join(processes)
    assert time.monotonic() < deadline, 'no progress'
    time.sleep(0.02)


def figures(workdir: pathlib.Path) -> list[tuple]:
  """Everything about every step that does not depend on the clock, with all digits."""
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  lines = [json.loads(line) for line in text.split('\n')[:-1]]
  return [tuple(line[k] for k in ('step', 'loss', 'lr', 'grad_norm', 'max_vio')) for line in lines]
