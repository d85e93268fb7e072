"""Runs a command inside the test's process, without the seconds that a new one needs to start."""

import json
import sys
from typing import Any

import pytest
from absl import flags

from experiments.common import cli


def run(command: Any, *arguments: str, words: bool = False) -> int | None:
  """Runs the module `command` with `arguments`, forgets its flags, and returns its status."""
  values = flags.FLAGS
  before = set(values)
  argv = [command.__name__, *map(str, arguments)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', argv)  # a run's record quotes it
    try:
      command.define_flags()
      return command.main(cli.parse_flags(argv, words))
    finally:
      values.remove_flag_values(set(values) - before)


def run_json(capsys: pytest.CaptureFixture, command: Any, *arguments: str) -> dict:
  """What a command prints with --json."""
  capsys.readouterr()
  run(command, *arguments, '--json')
  return json.loads(capsys.readouterr().out)
