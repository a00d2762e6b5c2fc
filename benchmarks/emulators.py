"""Servers of the buckets' protocols on loopback: moto's for S3, gcp-storage-emulator's for Google's."""

import contextlib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator

BUCKET = 'alexnet-tests'


@contextlib.contextmanager
def server(scheme: str) -> Iterator[dict[str, str]]:
  """Gives the environment in which programs, and this one, find a server with an empty bucket.

  Raises ImportError if it is not installed.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  if scheme == 's3':
    from moto.server import ThreadedMotoServer

    logging.getLogger('werkzeug').setLevel(logging.ERROR)  # a line for each request
    running = ThreadedMotoServer('127.0.0.1', port, verbose=False)
    secrets = {
      'AWS_ACCESS_KEY_ID': 'test',
      'AWS_SECRET_ACCESS_KEY': 'test',
      'AWS_DEFAULT_REGION': 'us-east-1',
    }
    environment = secrets | {'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}'}
  else:
    from gcp_storage_emulator.server import create_server

    running = create_server('127.0.0.1', port, in_memory=True, default_bucket=BUCKET)
    environment = {'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{port}'}
  before = {name: os.environ.get(name) for name in environment}
  running.start()
  if scheme == 'gs':
    running._api._httpd.handle_error = lambda *_: None  # a traceback of each answer that nobody waits for
    running._api._httpd.socket.listen(1024)  # of five, more than that at once are lost
  os.environ.update(environment)
  try:
    if scheme == 's3':
      import s3fs

      # What earlier servers of this process were given, moto has kept.
      urllib.request.urlopen(f'{environment["AWS_ENDPOINT_URL"]}/moto-api/reset', b'').close()
      s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
    yield environment
  finally:
    running.stop()
    for name, value in before.items():
      os.environ.pop(name) if value is None else os.environ.update({name: value})
