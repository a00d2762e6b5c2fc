"""`alexnet-flax demo`: the page's predictions, its limits, and the address it listens on."""

import asyncio
import html
import io
import itertools
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from alexnet_flax import VARIANTS
from alexnet_flax.cli.main import main
from alexnet_flax.inference.predict import predict
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.viz import demo
from tests.helpers import digits_run, encode, random_variables, smooth_image

testclient = pytest.importorskip('starlette.testclient', reason='Starlette is not installed')
httpx = pytest.importorskip('httpx', reason='httpx is not installed')

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)


@pytest.fixture(scope='module')
def network():
  names = ('cat', '<b>dog</b>', 'temple', 'flower', 'sea', 'sky')
  return PretrainedModel('net', AlexNet(SPEC, 6), random_variables(SPEC, 6), names)


@pytest.fixture
def client(network):
  hosts = ('localhost', '127.0.0.1')
  return testclient.TestClient(demo.application(network, hosts), base_url='http://localhost')


def photo():
  buffer = io.BytesIO()
  Image.fromarray(load_sample_images().images[0]).save(buffer, 'JPEG')
  return buffer.getvalue()


def bits(width, height):
  buffer = io.BytesIO()
  Image.new('1', (width, height)).save(buffer, 'PNG')
  return buffer.getvalue()


def test_the_page(client):
  response = client.get('/')
  assert response.status_code == 200
  assert 'What is in your image?' in response.text
  assert 'The network <strong>net</strong> (variant <code>torchvision</code>' in response.text
  assert 'cat, &lt;b&gt;dog&lt;/b&gt;, temple' in response.text
  assert "default-src 'none'" in response.headers['content-security-policy']
  assert not re.search(r'(src|href)="(?!data:)', response.text)


def test_predictions_are_those_of_the_network(client, network, tmp_path):
  (tmp_path / 'photo.jpg').write_bytes(photo())
  (expected,) = predict(network, [str(tmp_path / 'photo.jpg')])
  response = client.post('/predict', files={'image': ('photo.jpg', photo())})
  assert response.status_code == 200
  for one in expected.best:
    assert f'{100 * one.probability:.1f} %' in response.text
  assert '&lt;b&gt;dog&lt;/b&gt;' in response.text
  assert '<b>dog' not in response.text
  for layer in ('conv1', 'relu5', 'pool5', 'fc6', 'fc8'):
    assert f'alt="activations of {layer}"' in response.text
  assert 'evidence for' in response.text
  assert response.text.index('Top-5 predictions') < response.text.index('<img')  # first, on a phone
  assert 'correct' not in response.text  # the network does not know it


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'text', 'not an image'),
    (b'', 'not an image'),
    (photo()[:2000], 'truncated'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),  # a format that is not accepted
    (bits(20001, 10000), 'are more than 100,000,000 pixels'),
  ],
  ids=['text', 'nothing', 'truncated', 'postscript', 'bomb'],
)
def test_files_that_are_not_images(client, content, reason):
  response = client.post('/predict', files={'image': ('a.jpg', content)})
  assert response.status_code == 422
  assert reason in response.text


def test_limits_of_size(client, monkeypatch):
  monkeypatch.setattr(demo, 'MAX_BYTES', 100_000)
  noise = encode(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8), 'PNG')
  assert len(noise) > 110_000
  response = client.post('/predict', files={'image': ('a.png', noise)})
  assert response.status_code == 422
  assert 'is larger than' in response.text


def form_of(content):
  request = httpx.Request('POST', 'http://localhost/predict', files={'image': ('a.png', content)})
  return request.read(), request.headers['content-type']


@pytest.mark.parametrize('length', [None, '10'])
def test_a_chunked_body_is_bounded_and_else_welcome(client, monkeypatch, length):
  """With 'chunked' a content length means nothing."""
  body, kind = form_of(encode(smooth_image(80, 80, 0), 'PNG'))
  headers = {'content-type': kind, 'transfer-encoding': 'chunked'} | (
    {'content-length': length} if length else {}
  )
  assert client.post('/predict', content=iter([body]), headers=headers).status_code == 200
  monkeypatch.setattr(demo, 'MAX_BYTES', 100_000)
  endless = itertools.chain([body[:500]], itertools.repeat(bytes(10_000), 1000))
  response = client.post('/predict', content=endless, headers=headers)
  assert response.status_code == 422
  assert 'is larger than' in response.text


def test_slow_bodies_end_and_images_are_decoded_one_at_a_time(network, monkeypatch):
  monkeypatch.setattr(demo, '_BODY_SECONDS', 0.2)
  active, most, real = 0, 0, demo._prediction
  body, kind = form_of(encode(smooth_image(80, 80, 0), 'PNG'))

  def counted(*given):
    nonlocal active, most
    active += 1
    most = max(most, active)
    found = real(*given)
    active -= 1
    return found

  async def slow():
    yield body[:300]
    await asyncio.sleep(60)

  async def ask():
    transport = httpx.ASGITransport(demo.application(network))
    async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
      bodies = [slow(), body, slow(), body, body, slow()]
      headers = {'content-type': kind}
      return await asyncio.gather(*(client.post('/predict', content=one, headers=headers) for one in bodies))

  monkeypatch.setattr(demo, '_prediction', counted)
  answers = asyncio.run(ask())
  assert [answer.status_code for answer in answers] == [422, 200, 422, 200, 200, 422]
  assert 'did not arrive within 0.2 seconds' in answers[0].text
  assert most == 1


def test_a_connection_that_says_nothing_is_closed(network, monkeypatch):
  monkeypatch.setattr(demo, '_CONNECTION_SECONDS', 0.3)
  served = demo.server(demo.application(network))
  with socket.create_server(('127.0.0.1', 0)) as listening:
    thread = threading.Thread(target=served.run, kwargs={'sockets': [listening]})
    thread.start()
    try:
      with socket.create_connection(listening.getsockname(), timeout=10) as idle:
        idle.sendall(b'GET / HTT')
        assert idle.recv(100) == b''
    finally:
      served.should_exit = True
      thread.join()


@pytest.mark.parametrize(
  'data',
  [
    {'files': {'other': ('a.jpg', b'x')}},
    {'data': {'image': 'text'}},
    {'content': b'x'},
  ],
)
def test_requests_without_a_file(client, data):
  response = client.post('/predict', **data)
  assert response.status_code == 422
  assert "the form has no file 'image'" in html.unescape(response.text)


def test_malformed_forms_and_thin_images(client):
  broken = client.post('/predict', content=b'x', headers={'content-type': 'multipart/form-data'})
  assert broken.status_code == 422
  assert 'Missing boundary' in broken.text
  thin = encode(np.zeros((1, 200_000), np.uint8), 'PNG')
  response = client.post('/predict', files={'image': ('a.png', thin)})
  assert response.status_code == 422
  assert 'too thin' in response.text


def test_other_methods_paths_and_hosts(client):
  assert client.get('/predict').status_code == 405
  assert client.get('/../../etc/passwd').status_code == 404
  assert client.get('/', headers={'host': 'evil.example'}).status_code == 400


def test_greyscale_and_odd_sides(client):
  for image in (np.full((1, 200), 90, np.uint8), smooth_image(3, 400, 0)):
    assert client.post('/predict', files={'image': ('a.png', encode(image, 'PNG'))}).status_code == 200


def test_a_port_that_is_in_use(data_dir, capsys):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    assert main(['demo', str(digits_run(data_dir)), '--port', str(port)]) == 2
  assert f'port {port} is in use; choose another with --port' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--port', '99999'], 'cannot listen on 127.0.0.1:99999'),
    (['--host', '203.0.113.1', '--port', '0'], 'cannot listen on 203.0.113.1:0'),
  ],
)
def test_invalid_addresses(data_dir, arguments, message, capsys):
  assert main(['demo', str(digits_run(data_dir)), *arguments]) == 2
  assert message in capsys.readouterr().err


def test_the_command_listens_on_loopback_and_stops_on_a_signal(data_dir):
  command = [sys.executable, '-m', 'alexnet_flax', 'demo', str(digits_run(data_dir)), '--port', '0']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout is not None
      address = process.stdout.readline().split()[0]
      assert re.fullmatch(r'http://127\.0\.0\.1:\d+', address)
      with urllib.request.urlopen(address, timeout=30) as response:
        assert b'recognizes 10 classes' in response.read()
      process.send_signal(signal.SIGINT)
      assert process.wait(30) == 0
    finally:
      process.kill()
