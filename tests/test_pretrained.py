"""Trained networks by the names that users give: runs, their checkpoints, files."""

import json
import shutil

import pytest

from alexnet_flax import pretrained
from alexnet_flax.cli.main import main
from alexnet_flax.cli.train import main as train
from alexnet_flax.errors import UsageError
from alexnet_flax.export import convert
from alexnet_flax.pretrained import find_run, load_pretrained, run_data
from alexnet_flax.viz import report
from tests.helpers import SMALL, digits_run

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
  """A run with three checkpoints: the second is the best, the last was saved without scores."""
  folder = tmp_path_factory.mktemp('runs') / 'mine'
  shutil.copytree(digits_run(data_dir), folder)
  (folder / 'checkpoints' / '20').rename(folder / 'checkpoints' / '30')
  for step, top1 in ((10, 0.25), (20, 0.5), (30, None)):
    place = folder / 'checkpoints' / str(step)
    files = json.loads((folder / 'checkpoints' / '30' / 'manifest.json').read_text())['files']
    files = {name: digest for name, digest in files.items() if not name.startswith('metrics/')}
    if top1 is None:
      shutil.rmtree(place / 'metrics')
    else:
      shutil.copytree(folder / 'checkpoints' / '30', place)
      (place / 'metrics' / 'metrics').write_text(json.dumps({'top1': top1}))
    (place / 'manifest.json').write_text(json.dumps({'files': files}))
  return folder


@pytest.mark.parametrize(('which', 'step'), [('', 30), ('@best', 20), ('@10', 10), ('@30', 30)])
def test_checkpoints_of_a_run_by_name(run, which, step):
  network = load_pretrained(f'{run}{which}')
  assert (network.step, network.source) == (step, f'{run}{which}')


def test_a_folder_whose_name_has_an_at(run, tmp_path):
  for name in ('a@b', 'me@best'):
    shutil.copytree(run, tmp_path / name)
    assert load_pretrained(tmp_path / name).step == 30
    assert load_pretrained(f'{tmp_path / name}@best').step == 20


@pytest.mark.parametrize(
  ('which', 'message'),
  [
    ('@bset', "after the @ comes best, or the step of a checkpoint, not 'bset'"),
    ('@', "not ''"),
    ('@11', 'no checkpoint 11 in .*: it has those of steps 10, 20, 30'),
  ],
)
def test_checkpoints_that_are_not_there(run, which, message):
  with pytest.raises(UsageError, match=message):
    load_pretrained(f'{run}{which}')


def test_no_best_and_a_damaged_one(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  folder = tmp_path / 'run' / 'checkpoints'
  (folder / '20' / 'default' / '_METADATA').unlink()
  with pytest.raises(UsageError, match=r'the checkpoint .*/20 is damaged: .*_METADATA is missing'):
    load_pretrained(f'{tmp_path}/run@best')
  for step in (10, 20):
    shutil.rmtree(folder / str(step))
  with pytest.raises(UsageError, match=r'no checkpoint best in .*: it has those of steps 30'):
    load_pretrained(f'{tmp_path}/run@best')


def test_damaged_records_of_a_run(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  for value in (5, ['a'], 'a\0b'):
    (tmp_path / 'run' / 'local.json').write_text(json.dumps({'data_dir': value}))
    with pytest.raises(UsageError, match=r'local\.json is broken: its data_dir is no path'):
      run_data(tmp_path / 'run')
  (tmp_path / 'run' / 'config.json').write_text('{}')  # a valid one, but of another network
  with pytest.raises(UsageError, match=r'step 30 is of another network than its config\.json: conv1 differs'):
    load_pretrained(tmp_path / 'run')


def test_options_that_a_run_does_not_need(run):
  assert load_pretrained(run, width=1 / 16).step == 30
  with pytest.raises(UsageError, match=r'that is not --width=0.5; leave it out'):
    load_pretrained(run, width=0.5)


@pytest.mark.parametrize(
  'words',
  [
    'predict a.png RUN',
    'predict a.png --weights RUN',
    'features RUN a.png --layers fc7 --out f.npz',
    'features a.png --weights RUN --layers fc7 --out f.npz',
    'evaluate RUN',
    'evaluate --weights RUN',
    'demo RUN',
    'demo --weights RUN',
    'convert RUN a.safetensors',
    'convert a.safetensors --weights RUN',
    'report RUN',
    'report --weights RUN',
  ],
)
def test_every_verb_takes_a_network_the_same_way(run, monkeypatch, tmp_path, capsys, words):
  def load(source, *given, **options):
    raise UsageError(f'would load {source}')

  for module in (pretrained, report, convert):
    monkeypatch.setattr(module, 'load_pretrained', load)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.png').touch()
  assert main([f'{run}@best' if word == 'RUN' else word for word in words.split()]) == 2
  assert f'would load {run}@best' in capsys.readouterr().err


def test_transfer_from_the_best(run, tmp_path, data_dir, capsys):
  flags = [f'--config.data.data_dir={data_dir}', f'--workdir={tmp_path}', '--config.transfer.new_head=false']
  assert train(['train.py', *SMALL, *flags, f'--config.transfer.source={run}@11']) == 2
  assert f'transfer.source={run}@11: no checkpoint 11' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ('predict a.png RUN RUN', 'are both networks; name one of them'),
    ('predict a.png RUN --weights torchvision', 'are both networks; name one of them'),
    ('predict RUN', 'is a network; name the images too'),
    ('demo RUN --weights caffe', 'are both networks; name one of them'),
    ('convert a.onnx', 'name the network and the file to write'),
    ('report', 'name the runs'),
  ],
)
def test_networks_that_are_named_twice_or_not_at_all(run, capsys, words, message):
  assert main([str(run) if word == 'RUN' else word for word in words.split()]) == 2
  assert message in capsys.readouterr().err


def test_a_file_with_an_at_sign_beside_a_folder(tmp_path):
  (tmp_path / 'cats').mkdir()
  (tmp_path / 'cats@2x.jpg').write_bytes(b'')
  assert find_run(tmp_path / 'cats@2x.jpg') is None
