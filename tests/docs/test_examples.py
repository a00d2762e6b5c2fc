"""The examples for clusters, the container and the notebook name what there is, and the notebook runs."""

import pathlib
import re
import shlex

import pytest
import yaml

from alexnet_flax import VARIANTS, save_weights
from alexnet_flax.cli.train import parse
from alexnet_flax.errors import PreemptedError
from tests.helpers import random_variables

EXAMPLES = pathlib.Path('docs/examples')
NOTEBOOK = pathlib.Path('docs/tutorials/alexnet_flax.ipynb')


def training(text):
  """The configuration and the folder of a text's command, which parses as train.py does."""
  (flags,) = re.findall(r'train\.py( --[^"\n]*)', text)
  return parse(['train.py', *shlex.split(flags)])


def test_skypilot():
  task = yaml.safe_load((EXAMPLES / 'skypilot.yaml').read_text())
  assert set(task) == {'name', 'workdir', 'resources', 'envs', 'file_mounts', 'setup', 'run'}
  config, workdir = training(task['run'])
  for folder in (config.data.data_dir, workdir):
    assert any(
      pathlib.Path(mount) in (pathlib.Path(folder), *pathlib.Path(folder).parents)
      for mount in task['file_mounts']
    )
  assert set(re.findall(r'\$\{(\w+)\}', str(task['file_mounts']))) == set(task['envs'])
  (lock,) = re.findall(r'-r (\S+)', task['setup'])
  assert pathlib.Path(lock).is_file()
  assert task['resources']['job_recovery'] == {'recover_on_exit_codes': [PreemptedError.exit_code]}


def test_xpk():
  text = (EXAMPLES / 'xpk.sh').read_text()
  config, workdir = training(text)
  assert (config.data.batch_size, workdir) == (1024, '/runs/imagenet')
  assert f'--restart-on-exit-codes={PreemptedError.exit_code} ' in text


def test_the_container():
  text, ignored = (pathlib.Path(name).read_text() for name in ('Containerfile', '.dockerignore'))
  assert re.findall(r'ARG LOCK=(\w+)|LOCK=(\w+)', text) == [('', 'all'), ('', 'tpu'), ('cuda', '')]
  for source in (
    'requirements/all.txt',
    'requirements/cuda.txt',
    'requirements/tpu.txt',
    'train.py',
    'configs',
  ):
    assert pathlib.Path(source).exists()
    assert f'!{source}\n' in ignored
  training(' '.join(re.search(r'CMD \[(.*)\]', text)[1].replace('"', '').split(', ')))


def test_examples_are_shown():
  pages = ''.join(path.read_text() for path in pathlib.Path('docs').glob('*.md'))
  for path in EXAMPLES.iterdir():
    assert f'--8<-- "{path}"' in pages
  assert NOTEBOOK.name in pages


def test_the_notebook(tmp_path, data_dir, monkeypatch):
  nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
  pytest.importorskip('ipykernel')
  notebook = nbformat.read(NOTEBOOK, 4)
  assert not any(cell.get('outputs') for cell in notebook.cells)
  spec = VARIANTS['torchvision'].scaled(1 / 16)
  save_weights(tmp_path / 'a.pth', spec, random_variables(spec, 1000))
  monkeypatch.setenv('TFDS_DATA_DIR', data_dir)
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path().resolve()))  # of the kernel, which is another process
  cells = {cell.id: cell for cell in notebook.cells if 'install' not in cell.metadata.get('tags', ())}
  for name, full, small in [
    ('digits', "'model.width': 0.25", "'model.width': 1 / 16"),
    ('digits', "'total_epochs': 10.0", "'total_steps': 3, 'optimizer.warmup_steps': 0"),
    ('torchvision', "weights = 'torchvision'", "weights = 'a.pth'"),
  ]:
    assert cells[name].source.count(full) == 1
    cells[name].source = cells[name].source.replace(full, small)
  notebook.cells = list(cells.values())
  nbclient.NotebookClient(notebook, timeout=600, resources={'metadata': {'path': tmp_path}}).execute()
  said = {name: ''.join(one.get('text', '') for one in cells[name].get('outputs', ())) for name in cells}
  assert 'done: 3 steps' in said['digits']
  assert (tmp_path / 'runs/digits/metrics.jsonl').is_file()
  assert len(re.findall(r'^ +\d+\.\d% ', said['torchvision'], re.M)) == 10
