"""Digests, and downloads that fail in every way."""

import hashlib
import http.server
import sys
import threading
import time

import pytest

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.errors import UsageError
from alexnet_flax.files import without_credentials
from alexnet_flax.weights import download, open_weights
from alexnet_flax.weights.download import local_path
from tests.helpers import random_variables

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)


def written(path):
  save_weights(path, SPEC, random_variables(SPEC, 5))
  return path.read_bytes()


def test_digests(tmp_path):
  content = written(tmp_path / 'a.safetensors')
  digest = hashlib.sha256(content).hexdigest()
  good, bad = tmp_path / f'a-{digest[:8]}.pth', tmp_path / 'a-0123abcd.pth'
  good.write_bytes(content)
  bad.write_bytes(content)
  load_weights(good, SPEC)
  with pytest.raises(
    UsageError, match=f'wrong digest: its sha256 is {digest[:8]}, not 0123abcd; .* another name'
  ):
    load_weights(bad, SPEC)
  with pytest.raises(UsageError, match='wrong digest'):
    load_weights(bad.rename(tmp_path / 'a-lr0.001-0123abcd.pth.tar'), SPEC)
  beside = tmp_path / 'a.safetensors.sha256'
  beside.write_text(f'{digest}  a.safetensors\n')
  load_weights(tmp_path / 'a.safetensors', SPEC)
  beside.write_text('0' * 64)
  with pytest.raises(UsageError, match='wrong digest'):
    load_weights(tmp_path / 'a.safetensors', SPEC)
  for text in ('a digest', ''):
    beside.write_text(text)
    with pytest.raises(UsageError, match='not a SHA-256 digest'):
      load_weights(tmp_path / 'a.safetensors', SPEC)
  # Dates, and what was converted from a file of PyTorch's hub: its name states another file's digest.
  for name in ('run-20261124.pth', 'alexnet-owt-7be5be79.safetensors'):
    (tmp_path / name).write_bytes(content)
    load_weights(tmp_path / name, SPEC)


class Server(http.server.ThreadingHTTPServer):
  """Files on loopback: path -> (content, headers); `asked` has the requests."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.files, self.asked = {}, []
    self.address = f'http://127.0.0.1:{self.server_port}'


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.server.asked.append((self.path, self.headers.get('Authorization')))
    content, headers = self.server.files.get(self.path.partition('?')[0], (b'', {'Content-Length': '0'}))
    self.send_response(200 if content else 404)
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    for block in content if isinstance(content, list) else [content]:
      try:
        self.wfile.write(block)
      except OSError:  # the other side has had enough
        return
      time.sleep(0.02 * isinstance(content, list))

  def log_message(self, *_):
    pass


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setenv('ALEXNET_FLAX_CACHE', str(tmp_path / 'cache'))
  with Server() as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def sized(content, length=None):
  return content, {'Content-Length': str(len(content) if length is None else length)}


def test_downloading(server, tmp_path, monkeypatch):
  content = bytes(range(256)) * 4100  # 1 MiB and a little more
  digest = hashlib.sha256(content).hexdigest()
  name = f'/alexnet-{digest[:10]}.pth'
  monkeypatch.setitem(download.PUBLISHED, 'mine', (f'{server.address}/mine.pth', digest))
  server.files |= {
    name: sized(content),
    '/cut.pth': sized(content[:-9], len(content)),
    '/a-00000000ab.pth': sized(content),
    '/mine.pth': sized(content + b'x'),
    # A body that ends with the connection may be cut without notice, and one in chunks may not.
    '/endless.pth': (content, {}),
    f'/endless-{digest[:8]}.pth': (content, {}),
    '/chunks.pth': (b'5\r\nhello\r\n0\r\n\r\n', {'Transfer-Encoding': 'chunked'}),
    '/cut-chunks.pth': (b'5\r\nhello\r\n5\r\nwo', {'Transfer-Encoding': 'chunked'}),
  }
  for _ in range(2):
    assert local_path(server.address + name).read_bytes() == content
  assert [path for path, _ in server.asked] == [name]  # the second time from the cache
  for source, message in [
    (f'{server.address}/cut.pth', 'cannot download .*IncompleteRead'),
    (f'{server.address}/absent.pth', '404 Not Found; download it by hand and give its path'),
    (f'{server.address}/a-00000000ab.pth', 'wrong digest'),
    ('mine', 'wrong digest'),
    (f'{server.address}/endless.pth', 'does not state its length'),
    (f'{server.address}/cut-chunks.pth', 'cannot download'),
    ('http://127.0.0.1:9/a.pth', 'Connection refused; download it by hand'),
    ('http://[', 'cannot download'),
  ]:
    with pytest.raises(UsageError, match=message) as caught:
      local_path(source)
    assert '\n' not in str(caught.value)
  kept = sorted(path.name for path in (tmp_path / 'cache').rglob('*') if path.is_file())
  assert kept == [name[1:]]
  assert local_path(f'{server.address}/endless-{digest[:8]}.pth').read_bytes() == content
  assert local_path(f'{server.address}/chunks.pth').read_bytes() == b'hello'
  server.files['/mine.pth'] = sized(content)
  assert local_path('mine').read_bytes() == content


@pytest.mark.parametrize('extra', [0, 1, 2, 4095, 4096, 4097])
def test_every_size_around_a_block_comes_whole(server, extra):
  content = b'\x01' * ((1 << 20) + extra)
  server.files['/a.pth'] = sized(content)
  assert local_path(f'{server.address}/a.pth').read_bytes() == content


def test_downloads_are_bounded(server, tmp_path, monkeypatch):
  server.files['/drops.pth'] = [b'x'] * 100, {'Content-Length': '100'}
  server.files['/large.pth'] = sized(b'x' * 1000)
  monkeypatch.setattr(download, '_MAX_SECONDS', 0.2)
  with pytest.raises(UsageError, match='it takes more than'):
    local_path(f'{server.address}/drops.pth')
  monkeypatch.setattr(download, '_MAX_SECONDS', 60.0)
  monkeypatch.setattr(download, '_MAX_BYTES', 999)
  with pytest.raises(UsageError, match='it has more than 999 bytes'):
    local_path(f'{server.address}/large.pth')
  assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


def test_credentials_stand_nowhere(server, tmp_path):
  secret = server.address.replace('//', '//ada:se%40cret@')
  server.files['/a.safetensors'] = sized(written(tmp_path / 'a.safetensors'))
  file = open_weights(f'{secret}/a.safetensors?signature=hidden')
  assert server.asked[0][1].startswith('Basic ')
  shown = [file.source, str(file.path)]
  for source in (
    f'{secret}/absent.pth?token=hidden',
    'http://ada:secret@127.0.0.1:9/a.pth',
    'http://ada:secret@/a',
  ):
    with pytest.raises(UsageError) as caught:
      local_path(source)
    shown.append(str(caught.value))
  assert not [text for text in shown if 'cret' in text or 'hidden' in text or 'ada' in text]
  assert without_credentials('https://ada:b@c@host/x?y#z') == 'https://host/x'


def test_downloading_without_pooch(tmp_path, monkeypatch):
  monkeypatch.setenv('ALEXNET_FLAX_CACHE', str(tmp_path))
  monkeypatch.setitem(sys.modules, 'pooch', None)
  with pytest.raises(UsageError, match=r'downloading http.* needs pooch, which is not installed'):
    load_weights('http://127.0.0.1:9/a.pth', SPEC)
