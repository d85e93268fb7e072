"""A run whose workdir lies in a bucket: a folder here that is brought, and uploaded as it grows.

The run writes into a folder on this disk (`CACHE/buckets/workdirs/...`) as into any workdir. A
thread uploads what has changed every EVERY seconds, and the end of the block the rest: small files
first, then each checkpoint step, `_CHECKPOINT_METADATA` last, after a comparison of sizes. What was
deleted here is deleted there, of a step that object first. So whoever reads the bucket, or starts
there with an empty disk, finds steps that are whole, and a config and metrics at least as new.

Only what this run has written or brought is ever deleted: not what others have put there meanwhile,
no names that a run does not upload (`is_uploaded`), and nothing in a folder below that is a run of
its own.

A lease (`lease.py`) keeps other writers out. Each start that uploads writes a new token to the
object `.session`. A later start on this machine keeps its folder, and with it what could not be
uploaded, only if that token is still the one it knows; otherwise the bucket is right and the folder
is brought anew.

Of several processes, whose machines may have no common disk, the first has such a folder. The
others have a copy to start from, and hand their parts of checkpoints over (`parts.py`).
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping

from absl import logging

from moe_jax import atomic_files, errors
from moe_jax.config import paths
from moe_jax.storage import bucket as bucket_lib
from moe_jax.storage import fetch, lease, parts, upload, urls

EVERY = 10.0  # seconds between looks for what has changed
Stat = tuple[int, int]  # size, time of the last change


@contextlib.contextmanager
def opened(
  workdir: str | os.PathLike[str], flag: str, say: Callable[[str], None]
) -> Iterator[pathlib.Path]:
  """The path here at which the run of the block works; its own for a workdir on this disk.

  Args:
    workdir: a path here, or gs://BUCKET/KEY and s3://BUCKET/KEY.
    flag: what the user calls it.
    say: prints one line.

  Raises:
    errors.InputError: another run writes there, or the bucket fails.
  """
  if not urls.is_remote(workdir):
    yield paths.local(workdir, flag)
    return
  with mirrored(urls.parse(workdir, flag), flag) as mirror:
    mirror.start(say)
    with mirror.given_up_on_error():
      yield mirror.place
    mirror.finish()


@contextlib.contextmanager
def mirrored(url: urls.Url, flag: str) -> Iterator['Mirror']:
  """The folder here of the run at `url`, brought from there; nobody else writes it in the block.

  Raises:
    errors.InputError: another run writes there, or the bucket fails.
  """
  where, client, home = f'{flag}={url}', bucket_lib.Bucket(url, flag), _home(url)
  with atomic_files.lock(home), lease.held(client, url, where, parts.stop_run) as held:
    mirror = Mirror(client, url, where, home, held.check)
    mirror.bring()
    yield mirror


@contextlib.contextmanager
def copied(url: urls.Url, flag: str, process: int) -> Iterator[pathlib.Path]:
  """A folder with what the bucket holds of the run at `url`; deleted at the end of the block.

  Args:
    url: where another process of the run is the one that uploads.
    flag: what the user calls it.
    process: number of this one; those of one machine have a folder each.

  Raises:
    errors.InputError: it is in use, or the bucket cannot be read.
  """
  where, client, home = f'{flag}={url}', bucket_lib.Bucket(url, flag), _home(url, f'.{process}')
  with atomic_files.lock(home):
    shutil.rmtree(home / 'files', ignore_errors=True)  # of a process that was killed
    place = home / 'files' / url.key
    place.mkdir(parents=True)
    try:
      own, _ = _own(client.find(url.key), url)
      found = fetch.finished(own, where)
      fetch.download(client, found, home / 'files', home / 'versions', where)
      yield place
    finally:
      shutil.rmtree(home)


def _own(
  found: Mapping[str, bucket_lib.Object], url: urls.Url
) -> tuple[dict[str, bucket_lib.Object], tuple[str, ...]]:
  """(the objects of the run at `url`, beginnings of the names in folders of other runs below it).

  The others are told by a lease or a session of their own. What guards this run is left out.
  """
  begin = len(url.below('x').key) - 1
  lease_part, session_end = f'/{fetch.LEASE}/', f'/{fetch.SESSION}'
  others = set()
  for name in (key[begin:] for key in found):
    if lease_part in name:
      others.add(name[: name.index(lease_part) + 1])
    elif name.endswith(session_end):
      others.add(name.removesuffix(fetch.SESSION))
  # Nobody's run takes the checkpoints of this one away from it.
  others = {name for name in others if not name.startswith(('checkpoints/', f'{fetch.PARTS}/'))}
  left_out = (fetch.SESSION, f'{fetch.LEASE}/', f'{fetch.PARTS}/', *others)
  own = {key: one for key, one in found.items() if not key[begin:].startswith(left_out)}
  return own, tuple(sorted(others))


def _home(url: urls.Url, ending: str = '') -> pathlib.Path:
  name = hashlib.sha256(str(url).encode()).hexdigest()[:16]
  return paths.cache_root('') / 'buckets' / 'workdirs' / f'{name}{ending}'


class Mirror:
  """A folder here and the one in the bucket.

  Args:
    client: of the bucket.
    url: the folder there.
    where: how messages begin.
    home: where the folder here, and what is known about it, lies.
    check: raises if another process may write by now.
  """

  def __init__(
    self,
    client: bucket_lib.Bucket,
    url: urls.Url,
    where: str,
    home: pathlib.Path,
    check: Callable[[], None],
  ):
    self._client, self._url, self._where, self._check = client, url, where, check
    self._home, self._files = home, home / 'files'
    self.place, self.token = self._files / url.key, uuid.uuid4().hex
    self._session = url.below(fetch.SESSION).key
    self._claimed = False
    self._sent: dict[str, Stat] = {}  # as they were when they were uploaded
    self._there: set[str] = set()  # names in the bucket that this run has brought or written
    self._others: tuple[str, ...] = ()  # how names in folders of other runs begin
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name='upload', daemon=True)

  def bring(self):
    """Makes the folder here what a run goes on from: the bucket's, or its own if that is newer."""
    token = (self._client.read(self._session) or b'').decode()
    found, self._others = _own(self._client.find(self._url.key), self._url)
    finished = fetch.finished(found, self._where)
    begin = len(self._url.below('x').key) - 1
    # What is left of a step that was cut off is cleared away, in the run's own folder only.
    unfinished = self._url.below('checkpoints/').key
    brought = {key[begin:] for key in found if key in finished or key.startswith(unfinished)}
    self._there = set(filter(is_uploaded, brought))
    kept = self.place.exists() and token in self._read('session.json')
    if not kept:
      for folder in (self._files, self._home / 'versions'):
        shutil.rmtree(folder, ignore_errors=True)
      self.place.mkdir(parents=True)
      fetch.download(self._client, finished, self._files, self._home / 'versions', self._where)
      self._write('names.json', sorted(self._there))
    else:  # what others have put there since is not here, and stays
      self._there &= scan(self.place).keys() | set(self._read('names.json'))
    self._remember([token, self.token])
    # Of a folder that was kept, steps do not change, and what else there is goes up again.
    self._sent = {
      name: stat
      for name, stat in scan(self.place).items()
      if (not kept or fetch.step_of(name)[0])
      and (one := finished.get(self._url.below(name).key)) is not None
      and one.size == stat[0]
    }

  def _read(self, name: str) -> list[str]:
    """A list that an earlier process has left beside the folder here.

    `session.json` are the tokens in the bucket with which the folder is at least as new, and
    `names.json` what the run had in the bucket.
    """
    try:
      return json.loads((self._home / name).read_text(encoding='utf-8'))
    except (OSError, ValueError):
      return []

  def _write(self, name: str, values: list[str]):
    atomic_files.write_text(self._home / name, json.dumps(values))

  def _remember(self, tokens: list[str]):
    self._write('session.json', tokens)

  def start(self, say: Callable[[str], None]):
    """Uploads in a thread from now on."""
    say(f'{self._url} is worked on in {self.place} and uploaded every {EVERY:.0f} s')
    self._thread.start()

  @contextlib.contextmanager
  def given_up_on_error(self) -> Iterator[None]:
    """If the block fails, uploads what it has left before the error goes on."""
    try:
      yield
    except BaseException:
      self._stop()
      try:
        self.push()
      except errors.InputError as e:
        logging.error(self._left_over(e))
      raise

  def finish(self):
    """Uploads what is left, and ends.

    Raises:
      errors.InputError: the bucket fails, or is another's.
    """
    self._stop()
    try:
      self.push()
    except lease.LostError:
      raise
    except errors.InputError as e:
      raise errors.InputError(self._left_over(e)) from e

  def _stop(self):
    """Ends the thread, when what it is uploading has arrived."""
    self._ended.set()
    self._thread.join()

  def _run(self):
    told = ''
    while not self._ended.wait(EVERY):
      try:
        self.push()
        told = ''
      except lease.LostError:
        return
      except Exception as e:  # until the network is back; the last push raises what stays
        words = str(e) if isinstance(e, errors.InputError) else repr(e)
        if words != told:
          logging.warning(f'nothing is uploaded at the moment: {words}')
        told = words

  def push(self):
    """Uploads what has changed here, and deletes what has gone.

    Raises:
      errors.InputError: the bucket fails, or is another's.
    """
    files = {
      name: stat for name, stat in scan(self.place).items() if not name.startswith(self._others)
    }
    due = [name for name, stat in files.items() if self._sent.get(name) != stat]
    gone = sorted(
      self._there - files.keys(), key=lambda name: (not name.endswith(fetch.LAST), name)
    )
    if not (due or gone):
      return
    self._check()
    if not self._claimed:
      self._client.write(self._session, self.token.encode())
      self._remember([self.token])
      self._claimed = True
    self._write('names.json', sorted(self._there | files.keys()))
    groups: dict[str, list[str]] = {}
    for name in due:
      groups.setdefault(fetch.step_of(name)[0], []).append(name)
    self._put(groups.pop('', []), files)
    for step, names in sorted(groups.items()):
      self._put_step(step, names, files)
    self._check()
    self._delete(gone)

  def _put_step(self, step: str, names: list[str], files: Mapping[str, Stat]):
    """Uploads a step, so that it counts at the end or not at all."""
    last = f'{step}/{fetch.LAST}'
    if last not in files:
      return
    self._delete([last] if last in self._there else [])
    self._put([name for name in names if name != last], files)
    if not (self.place / last).exists():  # it has been deleted meanwhile
      return
    there = self._client.find(self._url.below(step).key)
    parts = [name for name in files if name.startswith(f'{step}/') and name != last]
    try:
      upload.check(there, {self._url.below(n).key: self.place / n for n in parts}, self._where)
    except FileNotFoundError:  # deleted while it was compared: the next look finds what is left
      return
    self._check()
    self._put([last], files)

  def _put(self, names: list[str], files: Mapping[str, Stat]):
    paths_here = {self._url.below(name).key: self.place / name for name in names}
    if not paths_here:
      return
    self._there.update(names)
    try:
      self._client.put(paths_here)
    except errors.InputError:
      if all(path.exists() for path in paths_here.values()):
        raise
      return  # deleted while it was read: the next look finds what is left
    self._sent.update({name: files[name] for name in names})

  def _delete(self, names: list[str]):
    self._client.delete([self._url.below(name).key for name in names])
    self._there -= set(names)
    for name in names:
      self._sent.pop(name, None)

  def _left_over(self, error: errors.InputError) -> str:
    """What to say of an upload that failed at the end."""
    return (
      f'{error}; what is not in the bucket lies in {self.place}: the same command on this machine '
      'goes on from there and uploads it'
    )


def scan(place: pathlib.Path) -> dict[str, Stat]:
  """Name -> state of the files of a run: no temporary ones, and no step in the making."""
  found = {}
  for path in sorted(_files(place)):
    name = path.relative_to(place).as_posix()
    if not is_uploaded(name):
      continue
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
      if path.is_file():
        stat = path.stat()
        found[name] = (stat.st_size, stat.st_mtime_ns)
  return found


def is_uploaded(name: str) -> bool:
  """Whether a file of this name, below the folder of a run, is one that goes to the bucket."""
  step, number = fetch.step_of(name)
  if step:
    return fetch.is_step_name(number)
  return not any(part.startswith('.') for part in name.split('/'))


def _files(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """What lies in directories that are there when they are read: steps are renamed and deleted."""

  def refused(error: OSError):
    if not isinstance(error, FileNotFoundError):
      raise error

  for directory, _, names in os.walk(place, onerror=refused):
    yield from (pathlib.Path(directory, name) for name in names)
