"""What units like: images made for them, and the best of a data set, against all activations."""

import itertools
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, AlexNet, features, load_pretrained
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.inference import units as inference
from alexnet_flax.inference.units import _pixels, maximize, output_shape, parse_units, peaks, top_images
from alexnet_flax.models.receptive_field import receptive_fields
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.viz.units import open_images
from tests.helpers import digits_run, encode, random_variables, smooth_image

pytestmark = pytest.mark.usefixtures('standard_promotion')

SMALL = VARIANTS['cifar10_small_alexnet'].scaled(1 / 16)


@pytest.fixture(scope='module')
def trained(data_dir):
  return load_pretrained(digits_run(data_dir))


@pytest.fixture(scope='module')
def digits(trained, data_dir):
  name, count, images = open_images('digits:test[:200]', trained.spec, data_dir)
  found = list(images)
  assert (name, count, len(found)) == ('digits:test[:200]', 200, 200)
  return found


@pytest.fixture
def small():
  return PretrainedModel('small', AlexNet(SMALL, 10), random_variables(SMALL, 10), tuple('abcdefghij'))


@pytest.mark.parametrize(('layer', 'objective'), [('relu3', 'channel'), ('conv3', 'center')])
def test_a_made_image_activates_its_unit_more_than_the_data_set(trained, digits, layer, objective):
  """By what it was made for: the mean of the channel; or the central unit, against those at all places."""
  units, reduce = [1, 4, 7], np.mean if objective == 'channel' else np.max
  made = maximize(trained, layer, units, objective)
  assert (made.shape, made.dtype) == ((3, 57, 57, 3), np.uint8)
  views = [*made, *(view for _, view in digits)]
  values = features(trained.model, trained.variables, views, [layer])[layer][..., units]
  mine = reduce(values[:3], (1, 2)) if objective == 'channel' else values[:3, 1, 1]
  assert (mine.diagonal() > reduce(values[3:], (1, 2)).max(0)).all()
  assert (mine.diagonal() > 0).all()


def test_top_images_are_those_of_all_activations(trained, digits):
  units, top = [0, 5, 11, 6], 60  # more than a batch
  values = features(trained.model, trained.variables, [view for _, view in digits], ['relu2'])['relu2']
  height, width = values.shape[1:3]
  for unit, found in zip(units, top_images(trained, 'relu2', units, iter(digits), top, 48), strict=True):
    peak = values[..., unit].reshape(len(digits), -1)
    order = np.argsort(-peak.max(1), kind='stable')[:top]
    assert [one.name for one in found] == [digits[i][0] for i in order]
    np.testing.assert_allclose([one.activation for one in found], peak.max(1)[order], rtol=1e-5)
    for one, i in zip(found, order, strict=True):
      assert (one.row, one.column) == np.unravel_index(peak[i].argmax(), (height, width))
      np.testing.assert_array_equal(one.view, digits[i][1])


def test_the_crop_is_what_the_unit_sees(trained, digits):
  """Grey everywhere else, the unit is as active as by the whole image."""
  (found,) = top_images(trained, 'conv2', [3], digits[:20], top=4)
  spans, copies = receptive_fields(trained.spec)['conv2'].spans, []
  for one in found:
    rows, columns = slice(*spans[one.row]), slice(*spans[one.column])
    copies.append(np.full_like(one.view, 77))
    copies[-1][rows, columns] = one.view[rows, columns]
    assert (copies[-1] != one.view).any()
  values = features(trained.model, trained.variables, copies, ['conv2'])['conv2']
  expected = [one.activation for one in found]
  at_the_peak = [values[i, one.row, one.column, 3] for i, one in enumerate(found)]
  np.testing.assert_allclose(at_the_peak, expected, rtol=1e-4)


def test_images_are_not_kept(small):
  alive = weakref.WeakValueDictionary()

  def images():
    for number in range(60):
      alive[number] = image = smooth_image(28, 28, number).copy()
      assert len(alive) <= 2 * 8 + 1  # two batches, and the one of the loop above
      yield str(number), image

  assert [len(best) for best in top_images(small, 'conv2', [0, 1], images(), 3, 8)] == [3, 3]


def test_equal_images_stay_in_order(small):
  images = [(name, np.full((28, 28, 3), 9, np.uint8)) for name in 'edcba']
  assert [one.name for one in top_images(small, 'fc5', [2], images, 4, 2)[0]] == ['e', 'd', 'c', 'b']


def test_the_image_of_a_unit_depends_on_unit_and_seed_alone(small, monkeypatch):
  monkeypatch.setattr(inference, 'AT_ONCE', 2)
  made = maximize(small, 'relu2', [2, 1, 3, 2], steps=3)
  np.testing.assert_allclose(made[0].astype(int), made[3], atol=1)
  other = maximize(small, 'relu2', [2, 1], steps=3, seed=1)
  for one, two in itertools.combinations([*made[:3], other[0]], 2):
    assert np.abs(one.astype(int) - two).mean() > 2


def test_first_images_are_smooth_and_mostly_grey():
  """Neighbouring pixels differ less than those far apart, and brightness more than colour."""
  waves = 0.1 * np.random.default_rng(0).normal(size=(4, 28, 15, 3, 2)).astype(np.float32)
  image = np.asarray(_pixels(waves.astype(np.float32)))
  assert np.abs(np.diff(image, axis=1)).mean() < 0.8 * np.abs(image[:, :14] - image[:, 14:]).mean()
  grey = image.mean(-1, keepdims=True)
  assert grey.std() > 2 * (image - grey).std()


def test_peaks_of_layers_without_space(small):
  views = np.stack([smooth_image(28, 28, seed) for seed in range(2)])
  values, rows, columns = peaks(small.model, small.variables, 'fc5', jnp.array([3]), views)
  np.testing.assert_allclose(values[:, 0], small.logits(views)[:, 3], rtol=1e-5)
  assert not rows.any()
  assert not columns.any()
  assert output_shape(small, 'fc5') == (10,)
  assert output_shape(small, 'conv1') == (28, 28, 4)


@pytest.mark.parametrize('text', ['', 'a', '1-', '-1', '3-1', '1,,2', '1.5', '1-2-3', '٣', '9' * 20])
def test_what_is_no_list_of_units(text):
  with pytest.raises(UsageError, match=r'is neither a unit nor a range; write them as in 0-15,20'):
    parse_units(text, 99)


def test_units():
  assert parse_units('0-3, 7,2 - 4', 8) == [0, 1, 2, 3, 7, 4]
  with pytest.raises(UsageError, match=r'there is no unit 8; the layer has 0 \.\.\. 7'):
    parse_units('0-8', 8)


def run_units(*words, capsys):
  code = main(['units', *map(str, words)])
  return code, capsys.readouterr()


def test_the_command(trained, tmp_path, capsys):
  folder = tmp_path / 'möwen [1] ü'
  folder.mkdir()
  for seed in range(3):
    (folder / f'{seed} <b>.png').write_bytes(encode(smooth_image(60, 70, seed), 'PNG'))
  out = tmp_path / 'units.html'
  options = '--layer', 'fc8', '--steps', 2, '--images', folder, '--top', 2
  code, said = run_units(trained.source, *options, '--out', out, capsys=capsys)
  assert (code, said.out, said.err) == (0, f'wrote {out}\n', '')
  page = out.read_text(encoding='utf-8')
  assert page.count('<img') == 10 * (1 + 2 * 2)
  assert '<h3>7</h3>' in page
  assert 'those of 3 images of möwen [1] ü that' in page
  assert '&lt;b&gt;.png' in page
  assert '<script' not in page
  assert str(tmp_path) not in page
  (folder / 'broken.png').write_bytes(b'no image')
  (folder / '.hidden.png').write_bytes(b'no image')
  png = tmp_path / 'units.png'
  code, said = run_units(f'{trained.source}@best', *options, '--out', png, capsys=capsys)
  assert code == 2
  assert 'cannot read broken.png: not an image\n' in said.err
  assert f'1 of the images cannot be read; {png} is written without them' in said.err
  assert png.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (('--layer', 'conv9'), "unknown layer 'conv9'; did you mean 'conv"),
    (('--layer', 'conv1', '--units', '0-6'), 'there is no unit 6; the layer has 0 ... 5'),
    (('--layer', 'conv1', '--out', 'units.gif'), '--out units.gif: the ending must be .html or .png'),
    (('--layer', 'conv1', '--out', 'absent/units.png'), 'there is no folder absent'),
    (('--layer', 'conv1', '--seed', '-1'), '--seed (=-1) must be between 0 and 4294967295'),
    (('--layer', 'conv1', '--steps', '0'), '--steps (=0) and --top (=8) must be at least 1'),
    (
      ('--layer', 'conv1', '--images', 'photoes'),
      '--images photoes is no file or folder, and as a data set: ',
    ),
    (('--layer', 'conv1', '--images', 'tests/cli'), 'no images in the folder tests/cli'),
    (('--layer', 'conv1', '--weights', 'torchvision'), 'are both networks; name one of them'),
    (('--layer', 'conv1', '--objective', 'all'), "invalid choice: 'all'"),
  ],
)
def test_mistakes(trained, options, message, capsys):
  code, said = run_units(trained.source, *options, capsys=capsys)
  assert code == 2
  assert message in said.err
  assert said.err.count('\n') == 1
