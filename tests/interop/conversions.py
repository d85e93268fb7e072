"""What the tests of interop share."""

import shutil

from experiments import convert
from tests import in_process

BLOCK = {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [5, 5]}


def import_(directory, workdir, *flags):
  in_process.run(convert, f'--from_hf={directory}', f'--workdir={workdir}', *flags)


def export(workdir, directory, *flags):
  in_process.run(convert, f'--to_hf={directory}', f'--workdir={workdir}', *flags)


def contents(directory) -> dict[str, bytes]:
  """The small files."""
  paths = [p for p in directory.iterdir() if 'safetensors' not in p.name]
  return {path.name: path.read_bytes() for path in paths}


def changed(name: str, function):
  """A change of one tensor."""

  def change(weights):
    weights[name] = function(weights[name])

  return change


def copy_of(imported, tmp_path):
  directory = tmp_path / 'in'
  shutil.copytree(imported[0], directory)
  return directory
