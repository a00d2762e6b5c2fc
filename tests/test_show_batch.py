"""`--show_batch`: the picture of what the network will see."""

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_flax.command_line import main


@pytest.fixture(autouse=True)
def standard_promotion():
  """optax's schedules and nn.BatchNorm mix types."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def shown(tmp_path, data_dir, *options):
  path = tmp_path / 'out.png'
  keys = [f'--config.data.data_dir={data_dir}', '--config.data.batch_size=16', *options]
  assert main(['train.py', '--config=configs/digits.py', f'--show_batch={path}', *keys]) == 0
  with Image.open(path) as opened:
    return np.asarray(opened.convert('RGB'))


def tiles(sheet):
  """(before, after) of the first eight."""
  corners = [4 + 164 * number for number in range(8)]
  return [(sheet[4:164, left : left + 160], sheet[164:324, left : left + 160]) for left in corners]


def test_without_augmentation_before_and_after_are_the_same(tmp_path, data_dir, capsys):
  plain = [
    '--config.data.crop_scale=(1.0,1.0)',
    '--config.data.crop_ratio=(1.0,1.0)',
    '--config.data.flip=false',
  ]
  for before, after in tiles(shown(tmp_path, data_dir, *plain)):
    assert np.abs(before.astype(int) - after).max() <= 2
    assert before.std() > 20
  assert '16 pictures of step 1' in capsys.readouterr().out
  assert not (tmp_path / 'runs').exists()


def test_what_is_done_shows(tmp_path, data_dir):
  changed = ['--config.augment.erasing=1.0', '--config.data.rotation=40']
  for before, after in tiles(shown(tmp_path, data_dir, *changed)):
    assert np.abs(before.astype(int) - after).mean() > 3


def test_a_path_that_cannot_be_written(tmp_path, data_dir, capsys):
  path = tmp_path / 'nowhere' / 'out.png'
  keys = [f'--config.data.data_dir={data_dir}', '--config.data.batch_size=16']
  assert main(['train.py', '--config=configs/digits.py', f'--show_batch={path}', *keys]) == 2
  assert 'cannot write --show_batch' in capsys.readouterr().err
