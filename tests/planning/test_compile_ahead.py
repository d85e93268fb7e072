"""The way to a process of its own and back, without a compiler for chips that are not there."""

import importlib.metadata
import subprocess
import sys

import jax
import pytest

from moe_jax import errors
from moe_jax.config import parse
from moe_jax.planning import compile_ahead
from tests import tiny


def job_of(**changes) -> compile_ahead.Job:
  return compile_ahead.Job(
    **({'values': parse.to_dict(tiny.make()), 'topology': 'v5e:2x2'} | changes)
  )


def compiled_of(text: str) -> compile_ahead.Compiled:
  return compile_ahead.Compiled(
    mesh={'data': 2},
    device_ids=[1, 0],
    extents={'data': {'0': 2}},
    arguments={'params': 8},
    parameter_sizes=[2],
    memory={'peak': 9},
    error='',
    lower_seconds=0.5,
    compile_seconds=1.5,
    cpu_seconds=2.0,
    host_memory_bytes=7,
    text=text,
  )


def test_a_result_comes_back_from_disk(tmp_path):
  compiled = compiled_of('HloModule é\n' * 3)
  compile_ahead.save(compiled, tmp_path)
  assert compile_ahead.load(tmp_path) == compiled


def test_the_key_hangs_on_the_job_and_the_compiler(monkeypatch):
  """Versions are made up: the compiler for TPUs need not be there."""
  versions = dict.fromkeys(compile_ahead.PACKAGES, '1.0')
  monkeypatch.setattr(importlib.metadata, 'version', versions.__getitem__)
  key = compile_ahead.key(job_of())
  assert key == compile_ahead.key(job_of())
  others = [job_of(topology='v5e:4x4'), job_of(decode=True), job_of(rows=1), job_of(context=8)]
  others.append(job_of(values=parse.to_dict(tiny.make(train__batch_size=16))))
  assert len({key, *map(compile_ahead.key, others)}) == 6
  for package in versions:
    versions[package] = '2.0'
    assert compile_ahead.key(job_of()) != key
    versions[package] = '1.0'


def test_bytes_on_one_device():
  mesh = tiny.mesh(data=2, expert=4)
  split = jax.NamedSharding(mesh, jax.P('data', 'expert'))
  tree = {
    'a': jax.ShapeDtypeStruct((4, 8), 'float32', sharding=split),  # 2 x 2 numbers of 4 bytes
    'b': jax.ShapeDtypeStruct((3,), 'bfloat16', sharding=jax.NamedSharding(mesh, jax.P())),
  }
  assert compile_ahead.bytes_per_device(tree) == 16 + 6


def test_the_process_of_its_own_reads_its_job_and_its_error_is_one_line(tmp_path, monkeypatch):
  """A topology that does not exist: what fails is the job, not the start of the process."""
  monkeypatch.setenv('XLA_FLAGS', '')
  with pytest.raises(errors.InputError) as error:
    compile_ahead._compile_apart(job_of(topology='nonsense:2x2'), tmp_path, progress=False)
  assert 'nonsense' in str(error.value).split('does not compile for it: ')[1]
  assert '\n' not in str(error.value)


def test_the_start_of_that_process_needs_no_more_than_the_library(tmp_path):
  code = f'import {compile_ahead.__name__} as own; assert own.main'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
