"""Draws a mesh and the table of rules: what each device holds, read from the real shardings.

python -m experiments.pod_plans.picture [--picture=docs/mesh.png]
"""

from collections.abc import Sequence

from experiments.common import cli


def define_flags():
  """Flags of this command."""
  cli.path_flag('picture', 'docs/mesh.png', 'file to write')


def main(argv: Sequence[str]):
  """Makes eight virtual devices and draws."""
  from experiments.pod_plans import mesh_picture

  mesh_picture.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
