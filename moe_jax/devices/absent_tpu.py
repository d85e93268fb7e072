"""A machine that has the TPU library, to plan and compile for TPUs, and no accelerator itself.

JAX tries every library it finds. The one for TPUs (`libtpu`, extra `tpu`) then complains on such a
machine in half a page, for each command, from native code that no logger rules. So JAX is told
beforehand to use the CPU, which it would end up with.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
from collections.abc import Mapping

import jax

_GOOGLE = '0x1ae0'  # vendor of TPUs on the PCI bus
# Device files of TPUs, and of NVIDIA and AMD GPUs.
_DEVICES = ('accel*', 'vfio/[0-9]*', 'nvidia[0-9]*', 'nvidiactl', 'kfd', 'dxg')
# Whoever sets one of these knows what JAX should look for.
_CHOICES = ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME', 'JAX_FORCE_TPU_INIT', 'TPU_NAME')


def use_cpu_where_nothing_else_is():
  """Keeps JAX from looking for a TPU with `libtpu` on a machine that has no accelerator.

  Call it before anything touches a device.
  """
  if importlib.util.find_spec('libtpu') is None or _other_plugins():
    return
  if is_bare(os.environ, pathlib.Path('/')):
    jax.config.update('jax_platforms', 'cpu')


def _other_plugins() -> list[str]:
  """Installed plugins for devices whose files this module does not know."""
  space = importlib.util.find_spec('jax_plugins')
  found = [m.name for m in pkgutil.iter_modules(space.submodule_search_locations if space else [])]
  found += [entry.name for entry in importlib.metadata.entry_points(group='jax_plugins')]
  return [name for name in found if not name.startswith(('xla_cuda', 'xla_rocm'))]


def is_bare(environ: Mapping[str, str], root: pathlib.Path) -> bool:
  """Whether nothing has been chosen in the environment and no accelerator is attached.

  Args:
    environ: the environment.
    root: of the file system.
  """
  if any(environ.get(name) for name in _CHOICES):
    return False
  if any(any((root / 'dev').glob(pattern)) for pattern in _DEVICES):
    return False
  vendors = (root / 'sys/bus/pci/devices').glob('*/vendor')
  return all(vendor.read_text().strip() != _GOOGLE for vendor in vendors)
