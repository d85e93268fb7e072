"""Servers of the two protocols, each in a thread on 127.0.0.1.

The GCS emulator does not know `ifGenerationMatch=0`, on which the lease of a workdir rests, so that
rule is added to it here, as the reference of the JSON API has it.
"""

import contextlib
import http
import importlib
import socket
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def google() -> Iterator[dict[str, str]]:
  """Environment in which gs:// is an empty server."""
  server = importlib.import_module('gcp_storage_emulator.server')
  handlers = importlib.import_module('gcp_storage_emulator.handlers.objects')
  plain = handlers._multipart_upload

  def upload(request, response, storage):
    bucket, key = request.params['bucket_name'], request.query.get('name')
    key = key[0] if key else request.data['meta'].get('name')
    if request.query.get('ifGenerationMatch') == ['0']:
      try:
        storage.get_file_obj(bucket, key)
      except Exception:
        return plain(request, response, storage)
      response.status = http.HTTPStatus.PRECONDITION_FAILED
      return response.json({'error': {'code': 412, 'message': 'conditionNotMet'}})
    return plain(request, response, storage)

  handlers._multipart_upload = upload
  port = _free_port()
  try:
    with server.create_server('127.0.0.1', port, in_memory=True):
      yield {
        'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{port}',
        # gcsfs would ask the real cloud, with credentials, what kind of bucket this is.
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      }
  finally:
    handlers._multipart_upload = plain


@contextlib.contextmanager
def amazon() -> Iterator[dict[str, str]]:
  """Environment in which s3:// is an empty server."""
  moto = importlib.import_module('moto.server')
  server = moto.ThreadedMotoServer('127.0.0.1', 0, verbose=False)
  server.start()
  try:
    host, port = server.get_host_and_port()
    # What it holds outlives the server, in this process.
    urllib.request.urlopen(f'http://{host}:{port}/moto-api/reset', data=b'').close()
    yield {
      'AWS_ENDPOINT_URL': f'http://{host}:{port}',
      'AWS_ACCESS_KEY_ID': 'test',
      'AWS_SECRET_ACCESS_KEY': 'test',
      'AWS_DEFAULT_REGION': 'us-east-1',
    }
  finally:
    server.stop()


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
