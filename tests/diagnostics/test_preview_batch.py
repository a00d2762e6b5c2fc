"""`--show_batch`: the drawing of the network's input."""

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_flax import AlexNet, create_train_state, sgd, train_step
from alexnet_flax.cli.train import main
from alexnet_flax.data.images import caption_font
from alexnet_flax.diagnostics.preview_batch import seen_in_step
from alexnet_flax.models.spec import Dense, Flatten, Spec

pytestmark = pytest.mark.usefixtures('standard_promotion')


def shown(tmp_path, data_dir, *options):
  path = tmp_path / 'out.png'
  keys = [f'--config.data.data_dir={data_dir}', '--config.data.batch_size=16', *options]
  assert main(['train.py', '--config=configs/digits.py', f'--show_batch={path}', *keys]) == 0
  with Image.open(path) as opened:
    return np.asarray(opened.convert('RGB'))


def tiles(sheet):
  """Returns (before, after) of the first eight images."""
  corners = [56 + 172 * number for number in range(8)]
  return [(sheet[6:166, left : left + 160], sheet[172:332, left : left + 160]) for left in corners]


def test_without_augmentation_both_images_are_equal(tmp_path, data_dir, capsys):
  plain = [
    '--config.data.crop_scale=(1.0,1.0)',
    '--config.data.crop_ratio=(1.0,1.0)',
    '--config.data.flip=false',
  ]
  for before, after in tiles(shown(tmp_path, data_dir, *plain)):
    assert np.abs(before.astype(int) - after).max() <= 2
    assert before.std() > 20
  assert '16 images of step 1' in capsys.readouterr().out
  sheet = np.asarray(Image.open(tmp_path / 'out.png').convert('RGB'))
  assert (sheet[80:90, :56] < 128).any()  # the names of both rows
  assert (sheet[246:256, :56] < 128).any()
  assert (sheet[166:172] == 255).all()  # gaps between the rows, and between pairs
  assert (sheet[:332, 216:228] == 255).all()
  assert not (tmp_path / 'runs').exists()


def test_augmentation_is_visible(tmp_path, data_dir):
  changed = ['--config.augment.erasing=1.0', '--config.data.rotation=40']
  for before, after in tiles(shown(tmp_path, data_dir, *changed)):
    assert np.abs(before.astype(int) - after).mean() > 3


def test_a_path_that_cannot_be_written(tmp_path, data_dir, capsys):
  path = tmp_path / 'nowhere' / 'out.png'
  keys = [f'--config.data.data_dir={data_dir}', '--config.data.batch_size=16']
  assert main(['train.py', '--config=configs/digits.py', f'--show_batch={path}', *keys]) == 2
  assert 'cannot write --show_batch' in capsys.readouterr().err


@pytest.mark.parametrize('accumulate_steps', [1, 2, 4])
def test_the_drawing_shows_the_input_of_the_step(accumulate_steps):
  model = AlexNet(Spec('linear', (Flatten(), Dense(None)), 8, 'made up', num_classes=10))
  state = create_train_state(model, sgd(0.1), jax.random.key(0), (8, 8, 3))
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
    'label': np.arange(8, dtype=np.int32),
    'weight': np.ones(8, np.float32),
  }
  given = {}

  def keep(labels, images):
    given.update(zip(labels.tolist(), np.asarray(images), strict=True))

  def noisy(batch, key):
    images = batch['image'] / np.float32(255) + jax.random.uniform(key, batch['image'].shape)
    return batch | {'image': images}

  def watched(batch, key):
    batch = noisy(batch, key)
    jax.debug.callback(keep, batch['label'], batch['image'])
    return batch

  key = jax.random.key(7)
  jax.jit(lambda: train_step(state, batch, key, preprocess=watched, accumulate_steps=accumulate_steps))()
  jax.effects_barrier()
  seen = seen_in_step(noisy, batch, jax.random.fold_in(key, 0), accumulate_steps)
  np.testing.assert_array_equal(seen['label'], batch['label'])
  np.testing.assert_allclose(seen['image'], np.stack([given[label] for label in range(8)]), atol=1e-6)


def test_captions_in_other_scripts():
  """A letter that a font lacks is drawn as a box, the same for all."""
  font = caption_font(12)
  drawn = {letter: bytes(font.getmask(letter)) for letter in 'ÄéžŁЖΩ\U0010fffd'}
  assert len(set(drawn.values())) == len(drawn)
