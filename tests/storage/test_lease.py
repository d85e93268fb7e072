import json
import os
import time

import pytest

from moe_jax import errors
from moe_jax.storage import bucket, lease, urls

URL = urls.parse('gs://b1/run')
GONE = 2**22 + 1  # above every process number


def claim(process=1, machine='m', until=100.0):
  return lease.Claim('host', process, machine, until)


def number(claims, now=50.0, machine='m'):
  return lease.next_number(claims, now, machine, '--workdir=gs://b1/run')


def test_the_first_lease_is_number_one():
  assert number({}) == 1


def test_a_lease_that_is_held_is_refused_with_its_owner_and_end():
  with pytest.raises(errors.InputError, match="process 1 of 'host'.*free in 50 s"):
    number({1: claim(until=0), 2: claim()})


def test_a_lease_is_taken_over_after_its_end_or_that_of_its_process():
  assert number({3: claim()}, now=100.0) == 4
  assert number({3: claim(process=GONE)}) == 4
  for other in ('', 'n'):  # there, nobody here can tell
    with pytest.raises(errors.InputError, match='free in'):
      number({3: claim(process=GONE)}, machine=other)
  with pytest.raises(errors.InputError, match='free in'):
    number({3: claim(process=GONE, machine='')}, machine='')


def held(client):
  return lease.Lease(client, URL, 'W')


def leases(objects):
  return [os.path.basename(path) for path in objects.find('b1/run/.lease')]


def test_one_holds_it_and_gives_it_back(objects):
  client = bucket.Bucket(URL)
  with lease.held(client, URL, 'W') as first:
    first.check()
    with pytest.raises(errors.InputError, match=f'W is being written by process {os.getpid()}'):
      held(client)
  assert leases(objects) == []
  held(client).close()


def test_an_owner_that_slept_too_long_finds_out(objects):
  client, lost = bucket.Bucket(URL), []
  first = lease.Lease(client, URL, 'W', lambda: lost.append(1))
  text = json.loads(client.read('run/.lease/1'))
  client.write('run/.lease/1', json.dumps({**text, 'until': 0}).encode())
  second = held(client)
  assert leases(objects) == ['2']
  with pytest.raises(lease.LostError, match='taken over by another process'):
    first.check()
  first.close()
  second.check()
  second.close()
  assert leases(objects) == [] and lost == []


def test_of_two_that_come_at_once_one_gets_it(objects, monkeypatch):
  client = bucket.Bucket(URL)
  monkeypatch.setattr(client, 'create', lambda key, data: False)
  with pytest.raises(errors.InputError, match='just taken'):
    held(client)
  assert leases(objects) == []


def test_it_is_renewed_and_its_loss_told(objects, monkeypatch):
  monkeypatch.setattr(lease, 'EVERY', 0.01)
  client, lost = bucket.Bucket(URL), []
  first = lease.Lease(client, URL, 'W', lambda: lost.append(1))
  before = client.read('run/.lease/1')
  deadline = time.monotonic() + 10
  while client.read('run/.lease/1') == before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert client.read('run/.lease/1') != before
  client.write('run/.lease/2', b'')
  first._thread.join(10)
  assert lost == [1]
  first.close()


def test_what_is_no_lease_is_named(objects):
  objects.pipe_file('b1/run/.lease/1', b'{"host": 1}')
  with pytest.raises(errors.InputError, match=r'run/\.lease/1 is no lease.*delete it'):
    held(bucket.Bucket(URL))
