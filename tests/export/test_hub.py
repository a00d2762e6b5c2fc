"""`alexnet-flax hub` and `hf:OWNER/NAME`: the real huggingface_hub, and a server on loopback with its API."""

import base64
import hashlib
import http.server
import json
import pathlib
import pickle
import re
import sys
import threading

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from alexnet_flax import VARIANTS, load_pretrained, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.train import train
from tests.helpers import TINY, random_variables, replace, smooth_image

pytest.importorskip('huggingface_hub')

# httpx2's, at its use by huggingface_hub 2.4.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
TOKEN = 'hf_of_ada'


class Hub(http.server.ThreadingHTTPServer):
  """Repositories OWNER/NAME -> commits, each the files by name; ada may write to her own."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.commits, self.stored = {}, {}
    self.address = f'http://127.0.0.1:{self.server_port}'

  def stop(self):
    self.shutdown()
    self.server_close()

  def commit(self, name, files):
    self.commits[name].append(files)
    return f'{len(self.commits[name]):040x}'


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    lines = [json.loads(line) for line in body.splitlines()]
    if self.path == '/api/validate-yaml':
      text = lines[0]['content'].split('---\n')
      return self.answer({'errors': [], 'warnings': []} if yaml.safe_load(text[1]) else None)
    if self.headers.get('Authorization') != f'Bearer {TOKEN}':
      return self.answer({'error': 'Invalid username or password.'}, 401)
    if self.path == '/api/repos/create':
      name = f'{lines[0].get("organization") or "ada"}/{lines[0]["name"]}'
      if not name.startswith('ada/'):
        return self.answer({'error': "You don't have the rights to create a model there"}, 403)
      code = 409 if name in self.server.commits else 200
      self.server.commits.setdefault(name, [{}])
      return self.answer({'url': f'{self.server.address}/{name}'}, code)
    name = re.match(r'/(?:api/models/)?([^/]+/[^/.]+)', self.path)[1]
    if '/preupload/' in self.path:
      files = [
        {
          'path': one['path'],
          'uploadMode': 'lfs' if one['path'].endswith('.safetensors') else 'regular',
          'shouldIgnore': False,
        }
        for one in lines[0]['files']
      ]
      return self.answer({'files': files})
    if self.path.endswith('/info/lfs/objects/batch'):
      upload = lambda one: {'href': f'{self.server.address}/storage/{one["oid"]}'}  # noqa: E731
      objects = [{**one, 'actions': {'upload': upload(one)}} for one in lines[0]['objects']]
      return self.answer({'transfer': 'basic', 'objects': objects})
    files = dict(self.server.commits[name][-1])
    for line in lines:
      match line['key']:
        case 'file':
          files[line['value']['path']] = base64.b64decode(line['value']['content'])
        case 'lfsFile':
          files[line['value']['path']] = self.server.stored[line['value']['oid']]
    oid = self.server.commit(name, files)
    return self.answer({'commitUrl': f'{self.server.address}/{name}/commit/{oid}', 'commitOid': oid})

  def do_PUT(self):
    content = self.rfile.read(int(self.headers['Content-Length']))
    assert hashlib.sha256(content).hexdigest() == self.path.rpartition('/')[2]
    self.server.stored[self.path.rpartition('/')[2]] = content
    self.answer({})

  def do_GET(self):
    path = self.path.partition('?')[0]
    found = re.match(r'/(?:api/models/)?([^/]+/[^/]+?)(?:/(resolve|revision|tree)/([^/]+)(/.*)?)?$', path)
    name, _, revision, file = found.groups()
    if (commits := self.server.commits.get(name)) is None:
      return self.answer({'error': 'Repository not found'}, 401, {'X-Error-Code': 'RepoNotFound'})
    number = len(commits) if revision in (None, 'main') else int(revision, 16) if len(revision) == 40 else 0
    if not 0 < number <= len(commits):
      return self.answer({'error': 'Invalid rev id'}, 404, {'X-Error-Code': 'RevisionNotFound'})
    files, oid = commits[number - 1], f'{number:040x}'
    if not file:
      siblings = [{'rfilename': one, 'size': len(files[one])} for one in files]
      tree = [{'type': 'file', 'path': one, 'size': len(files[one]), 'oid': oid} for one in files]
      about = {'id': name, '_id': name, 'sha': oid, 'siblings': siblings, 'private': False, 'tags': []}
      return self.answer(tree if '/tree/' in path else {**about, 'downloads': 0, 'likes': 0})
    if file[1:] not in files:
      return self.answer({'error': 'Entry not found'}, 404, {'X-Error-Code': 'EntryNotFound'})
    content = files[file[1:]]
    etag = hashlib.sha256(content).hexdigest()
    return self.answer(content, headers={'X-Repo-Commit': oid, 'ETag': f'"{etag}"'})

  do_HEAD = do_GET  # noqa: N815

  def answer(self, content, code=200, headers=()):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(code)
    for key, value in {'Content-Length': str(len(body)), **dict(headers)}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """The server, which a fresh huggingface_hub knows by its environment."""
  monkeypatch.chdir(tmp_path)
  for name in [name for name in sys.modules if name.partition('.')[0] == 'huggingface_hub']:
    monkeypatch.delitem(sys.modules, name)
  with Hub() as server:
    monkeypatch.setenv('HF_ENDPOINT', server.address)
    monkeypatch.setenv('HF_HOME', f'{tmp_path}/.hub')
    monkeypatch.setenv('HF_HUB_DISABLE_XET', '1')  # another protocol, to another server
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stop()
    thread.join()


def line_of(capsys, *words):
  """The error of a command that must fail, without 'error: '."""
  assert main(list(words)) == 2, words
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert err.count('\n') == 1, err
  return err[7:-1]


@pytest.mark.usefixtures('standard_promotion')
def test_a_run_goes_to_the_hub_and_back(hub, data_dir, tmp_path, capsys):
  run = tmp_path / 'run'
  train(replace(TINY, data={'data_dir': data_dir}, total_steps=1, eval_every_steps=1), run)
  assert main(['hub', 'push', f'{run}@best', 'ada/digits', '--private']) == 0
  said = capsys.readouterr().out
  assert f"wrote {hub.address}/ada/digits; load_pretrained('hf:ada/digits') reads it" in said
  files = hub.commits['ada/digits'][-1]
  assert set(files) == {'model.safetensors', 'config.json', 'README.md'}
  _, front, card = files['README.md'].decode().split('---\n', 2)
  metadata, own = yaml.safe_load(front), load_pretrained(f'{run}@best')
  (result,) = metadata['model-index'][0]['results']
  lines = read_metrics(run)
  top1 = next(
    x['value'] for x in lines if (x['step'], x['split'], x['name']) == (own.step, 'test[:37]', 'top1')
  )
  assert result['dataset'] == {'name': 'digits', 'type': 'digits', 'split': 'test[:37]'}
  assert [one['value'] for one in result['metrics'] if one['name'] == 'top1'] == [top1]
  assert metadata['pipeline_tag'] == 'image-classification'
  assert "load_pretrained('hf:ada/digits')" in card
  assert str(run) not in card  # a path of this machine
  config = json.loads(files['config.json'])
  assert (config['variant'], config['image_size'], config['id2label']['7']) == ('batchnorm', 57, '7')
  loaded = load_pretrained('hf:ada/digits')
  assert (loaded.spec, loaded.class_names) == (own.spec, own.class_names)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, jax.device_get(own.variables))
  hub.stop()  # nobody answers: from the cache
  assert load_pretrained('hf:ada/digits').spec == own.spec


def test_revisions_folders_and_commands(hub, capsys):
  for seed in (1, 2):
    save_weights(
      'a.safetensors', SPEC, random_variables(SPEC, 3, seed), class_names=['cat', 'dog', 'axolotl']
    )
    assert main(['hub', 'push', 'a.safetensors', 'hf:ada/pets']) == 0
  first = load_pretrained(f'hf:ada/pets@{2:040x}')
  jax.tree.map(np.testing.assert_array_equal, first.variables, random_variables(SPEC, 3, 1))
  assert main(['hub', 'pull', 'ada/pets', '--out', 'my [pets]']) == 0
  assert 'ada/pets: torchvision\nwrote my [pets]/model.safetensors' in capsys.readouterr().out
  assert sorted(path.name for path in pathlib.Path('my [pets]').iterdir()) == sorted(
    hub.commits['ada/pets'][-1]
  )
  Image.fromarray(smooth_image(70, 80, 0)).save('a.png')
  said = []
  for network in (
    ['my [pets]'],
    ['hf:ada/pets'],
    ['--weights', 'hf:ada/pets'],
    ['--weights', 'a.safetensors'],
  ):
    assert main(['predict', 'a.png', *network]) == 0
    said.append(capsys.readouterr().out)
  assert 'axolotl' in said[0]
  assert len(set(said)) == 1


def test_what_goes_wrong_is_one_line(hub, capsys, monkeypatch):
  save_weights('a.safetensors', SPEC, random_variables(SPEC, 3))
  hub.commits |= {
    'ada/pickle': [{'pytorch_model.bin': pickle.dumps(print)}],
    'ada/other': [{'model.safetensors': pickle.dumps(print), 'config.json': b'{}'}],
  }
  no_repository = 'there is no such repository, or it is private and no valid token is here (hf auth login)'
  for words, message in [
    (['hub', 'pull', 'pets'], "'pets' is no repository on the Hub; write OWNER/NAME"),
    (['hub', 'pull', 'ada/a--b'], 'ada/a--b: '),
    (['hub', 'pull', 'ada/none'], f'ada/none: {no_repository}'),
    (['hub', 'pull', 'ada/pickle@dev'], 'ada/pickle@dev: there is no such revision'),
    (['hub', 'pull', 'ada/pickle'], 'ada/pickle has no model.safetensors; other files are not read'),
    (['hub', 'pull', 'ada/other'], 'ada/other: its model.safetensors is no safetensors file'),
    (['hub', 'pull', 'ada/none', '--out', 'no/where'], 'cannot write no/where: there is no folder no'),
    (['predict', 'a.png', '--weights', 'hf:ada/none'], f'hf:ada/none: {no_repository}'),
    (['hub', 'push', 'a.safetensors', 'bob/pets'], "bob/pets: your token does not allow it: You don't have"),
    (['hub', 'push', 'a.safetensors', 'ada/pets@dev'], 'leave out @dev'),
    (['hub', 'push', 'b.safetensors', 'ada/pets'], 'b.safetensors: no such file'),
    (['hub', 'psuh', 'a.safetensors', 'ada/pets'], "invalid choice: 'psuh'"),
  ]:
    assert message in line_of(capsys, *words)
  assert {path.name for path in pathlib.Path().iterdir()} == {'a.safetensors', '.hub'}
  monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
  assert no_repository in line_of(capsys, 'hub', 'push', 'a.safetensors', 'ada/pets')
  monkeypatch.delenv('HF_TOKEN')
  assert 'needs a token that may write: hf auth login' in line_of(
    capsys, 'hub', 'push', 'a.safetensors', 'ada/pets'
  )
  hub.stop()
  assert (
    line_of(capsys, 'hub', 'pull', 'ada/never') == f'ada/never: {hub.address}: [Errno 111] Connection refused'
  )
