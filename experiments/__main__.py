"""Lists the commands and the studies: python -m experiments."""

import sys

from experiments.common import command_list, flag_help


def main(arguments: list[str]) -> int:
  """Prints the list; status 2 if something else was asked for."""
  flag_help.show(command_list.text())
  unknown = [argument for argument in arguments if argument not in flag_help.HELP_ARGUMENTS]
  if unknown:
    print(f'error: {unknown[0]!r} is no flag here; run python -m experiments.NAME', file=sys.stderr)
  return 2 if unknown else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
