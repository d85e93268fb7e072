"""Where the processes of a run work: one folder for all, or one each and a bucket for the run.

With a workdir here, all processes see one folder. With one in a bucket the first process mirrors it
(`storage.workdir`): it holds the lease, writes, uploads, and has whole checkpoints. Every other one
brings a copy when the first has uploaded whatever its own folder had left, so that all go on
from the same steps; it writes nothing for others but its parts of checkpoints (`storage.parts`).
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from moe_jax.processes import agreement
from moe_jax.storage import bucket as bucket_lib
from moe_jax.storage import parts as parts_lib
from moe_jax.storage import urls
from moe_jax.storage import workdir as storage_workdir


class Place(NamedTuple):
  """The folder here of a run, and what carries parts of its checkpoints between such folders."""

  path: pathlib.Path
  parts: parts_lib.Parts | None = None  # None where all processes see the same folder


@contextlib.contextmanager
def opened(
  workdir: str | os.PathLike[str], flag: str, say: Callable[[str], None]
) -> Iterator[Place]:
  """The place of the run of the block; all processes call it.

  Args:
    workdir: a path here, or gs://BUCKET/KEY and s3://BUCKET/KEY.
    flag: what the user calls it.
    say: prints one line.

  Raises:
    errors.InputError: another run writes there, or the bucket fails for one of the processes.
  """
  if jax.process_count() == 1 or not urls.is_remote(workdir):
    with storage_workdir.opened(workdir, flag, say) as path:
      yield Place(path)
    return
  url = urls.parse(workdir, flag)
  first = agreement.is_first()
  with contextlib.ExitStack() as stack:
    mirror = None
    with agreement.together():
      if first:
        mirror = stack.enter_context(storage_workdir.mirrored(url, flag))
        mirror.push()
        parts_lib.clear(bucket_lib.Bucket(url, flag), url)
    token = agreement.texts(mirror.token if mirror else '')[0]
    with agreement.together():
      if mirror:
        path = mirror.place
      else:
        path = stack.enter_context(storage_workdir.copied(url, flag, jax.process_index()))
    agreement.require_same({f'the checkpoints of {flag}={url}': _steps(path)})
    if mirror:
      mirror.start(say)
    with mirror.given_up_on_error() if mirror else contextlib.nullcontext():
      yield Place(path, _parts(url, flag, token))
    with agreement.together():
      if mirror:
        mirror.finish()


def _steps(path: pathlib.Path) -> list[str]:
  return sorted(step.name for step in path.glob('checkpoints/[0-9]*') if '-tmp' not in step.name)


def _parts(url: urls.Url, flag: str, start: str) -> parts_lib.Parts:
  client = bucket_lib.Bucket(url, flag)
  index, count = jax.process_index(), jax.process_count()
  return parts_lib.Parts(client, url, f'{flag}={url}', start, index, count)
