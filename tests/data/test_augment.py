"""Augmentation on the device: what each does, how often, and that the key alone decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax.data.augment import Augmentation, augment, normalize
from alexnet_flax.data.prepare.color_pca import (
  IMAGENET,
  principal_components,
  read_components,
  write_components,
)
from alexnet_flax.models.spec import Preprocessing
from tests.helpers import smooth_image

BARE = Preprocessing(scale=1 / 255, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CLASSES = 10


def batch(count=64, size=16):
  images = np.stack([smooth_image(size, size, seed) for seed in range(count)])
  return {
    'image': jnp.asarray(images),
    'label': jnp.arange(count, dtype=jnp.int32) % CLASSES,
    'weight': jnp.ones(count),
  }


@functools.cache
def compiled(**options):
  step = functools.partial(
    augment, preprocessing=BARE, augmentation=Augmentation(**options), num_classes=CLASSES
  )
  return jax.jit(step)


def augmented(key=0, inputs=None, **options):
  return compiled(**options)(batch() if inputs is None else inputs, jax.random.key(key))


def pixels():
  return np.asarray(batch()['image'], np.float32) / 255


@pytest.mark.parametrize(
  'options',
  [
    {'pca_noise': 0.1},
    {'brightness': 0.4},
    {'contrast': 0.4},
    {'saturation': 0.4},
    {'hue': 0.2},
    {'erasing': 0.5},
    {'mixup': 0.2},
    {'cutmix': 1.0},
  ],
)
def test_the_key_alone_decides(options):
  one, same, other = (augmented(key, **options)['image'] for key in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  assert not np.array_equal(one, pixels())


def test_without_a_key_and_without_options_nothing_is_done():
  plain = normalize(batch(), preprocessing=BARE)['image']
  np.testing.assert_allclose(plain, pixels(), atol=1e-6)
  step = functools.partial(augment, preprocessing=BARE, num_classes=CLASSES)
  np.testing.assert_array_equal(step(batch(), augmentation=Augmentation(hue=0.5, mixup=1.0))['image'], plain)
  np.testing.assert_allclose(augmented()['image'], plain, atol=1e-6)
  with pytest.raises(TypeError, match='must be uint8'):
    step(batch() | {'image': plain}, jax.random.key(0), augmentation=Augmentation())


def test_pca_noise_is_one_colour_an_image_with_the_papers_covariance():
  count = 20_000
  inputs = {'image': jnp.full((count, 1, 1, 3), 128, jnp.uint8), 'label': jnp.zeros(count, jnp.int32)}
  added = np.asarray(augmented(inputs=inputs, pca_noise=0.1)['image'][:, 0, 0]) - 128 / 255
  vectors, values = np.array(IMAGENET.eigenvectors), np.array(IMAGENET.eigenvalues)
  expected = vectors.T @ np.diag((0.1 * values) ** 2) @ vectors
  np.testing.assert_allclose(np.cov(added.T), expected, atol=0.03 * expected.max())
  np.testing.assert_allclose(added.mean(0), 0, atol=1e-3)
  whole = np.asarray(augmented(pca_noise=0.1)['image']) - pixels()
  np.testing.assert_allclose(whole, np.broadcast_to(whole[:, :1, :1], whole.shape), atol=1e-6)


def test_brightness_is_a_factor_in_its_range():
  factors = []
  ours = np.asarray(augmented(brightness=0.4)['image'])
  for new, old in zip(ours, pixels(), strict=True):
    inside = (new < 1) & (old > 0.1)
    ratios = new[inside] / old[inside]
    assert np.ptp(ratios) < 1e-3
    factors.append(ratios.mean())
  assert 0.6 <= min(factors) < 0.75 < 1.25 < max(factors) <= 1.4


def test_contrast_and_saturation_are_mixtures_with_grey():
  old, luma = pixels(), np.array([0.2989, 0.587, 0.114], np.float32)
  gray = old @ luma
  for options, other in (
    ({'contrast': 0.4}, np.broadcast_to(gray.mean((1, 2))[:, None, None, None], old.shape)),
    ({'saturation': 0.4}, np.broadcast_to(gray[..., None], old.shape)),
  ):
    new = np.asarray(augmented(**options)['image'])
    inside = (new > 0) & (new < 1) & (np.abs(old - other) > 0.05)
    factors = np.where(inside, (new - other) / np.where(inside, old - other, 1), np.nan)
    spread = np.nanmax(factors, axis=(1, 2, 3)) - np.nanmin(factors, axis=(1, 2, 3))
    assert spread.max() < 1e-2
    assert 0.6 - 1e-3 <= np.nanmin(factors) < 0.75 < 1.25 < np.nanmax(factors) <= 1.4 + 1e-3


def test_hue_turns_the_circle_of_colours():
  import colorsys

  new, old = np.asarray(augmented(hue=0.2)['image'], np.float64), pixels().astype(np.float64)
  turns = []
  for one, other in zip(new, old, strict=True):
    (h1, s1, v1), (h0, s0, v0) = colorsys.rgb_to_hsv(*one[3, 5]), colorsys.rgb_to_hsv(*other[3, 5])
    assert (s1, v1) == pytest.approx((s0, v0), abs=1e-5)
    if s0 > 0.1:
      turns.append((h1 - h0 + 0.5) % 1 - 0.5)
  assert -0.2 <= min(turns) < -0.1 < 0.1 < max(turns) <= 0.2


def test_erasing_sets_a_rectangle_of_some_images_to_the_mean():
  inputs = {'image': jnp.full((2000, 24, 24, 3), 200, jnp.uint8), 'label': jnp.zeros(2000, jnp.int32)}
  erased = np.asarray(augmented(inputs=inputs, erasing=0.25)['image'] == 0)
  assert (erased.all(-1) == erased.any(-1)).all()
  shares = erased[..., 0].mean((1, 2))
  assert abs((shares > 0).mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
  assert 0.005 < shares[shares > 0].min() < 0.05 < 0.25 < shares.max() < 0.4
  for one in erased[shares > 0][..., 0]:
    rows, columns = one.any(1), one.any(0)
    assert (one == np.outer(rows, columns)).all()
    assert (np.diff(np.flatnonzero(rows)) == 1).all()


def test_mixup_is_a_mixture_of_images_and_of_labels_alike():
  out, old = augmented(mixup=1.0), pixels()
  share = float(out['label'][0, 0])
  assert 0 < share < 1
  np.testing.assert_allclose(out['image'], share * old + (1 - share) * np.roll(old, 1, 0), atol=1e-5)
  np.testing.assert_allclose(out['label'].sum(-1), 1, atol=1e-6)
  assert float(out['label'][3, 3]) == pytest.approx(share)
  assert float(out['label'][3, 2]) == pytest.approx(1 - share)


def test_cutmix_pastes_a_rectangle_and_labels_say_its_share():
  old = pixels()
  for key in range(5):
    out = augmented(key, cutmix=1.0)
    image = np.asarray(out['image'])
    own = np.isclose(image, old, atol=1e-6).all(-1)
    others = np.isclose(image, np.roll(old, 1, 0), atol=1e-6).all(-1)
    assert (own | others).all()
    share = float(out['label'][5, 5])
    assert 1 - share == pytest.approx(others[5].mean(), abs=0.02)


def test_shares_are_drawn_from_beta():
  small = [float(augmented(key, mixup=0.2)['label'][0, 0]) for key in range(60)]
  assert np.mean([min(share, 1 - share) < 0.1 for share in small]) > 0.5  # Beta(0.2, 0.2) has its mass there


def test_with_both_each_batch_takes_one():
  old = pixels()
  cut = []
  for key in range(40):
    image = np.asarray(augmented(key, mixup=1.0, cutmix=1.0)['image'])
    matches = np.isclose(image, old, atol=1e-6) | np.isclose(image, np.roll(old, 1, 0), atol=1e-6)
    cut.append(matches.mean() > 0.99)
  assert 10 <= sum(cut) <= 30


def test_principal_components_of_known_pixels(tmp_path):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(50_000, 3)) * [30, 10, 3] @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + 120
  found = principal_components(len(values), values.sum(0), values.T @ values)
  expected = np.cov(values.T / 255, bias=True)
  vectors, eigenvalues = np.array(found.eigenvectors), np.array(found.eigenvalues)
  np.testing.assert_allclose(vectors.T @ np.diag(eigenvalues) @ vectors, expected, atol=1e-9)
  assert (np.diff(eigenvalues) < 0).all()
  write_components(tmp_path, found)
  assert read_components(str(tmp_path), 'mine') == found
  assert read_components(str(tmp_path / 'nowhere'), 'mine') is None
  assert read_components(str(tmp_path / 'nowhere'), 'imagenet2012') == IMAGENET


def test_imagenets_components_are_those_of_its_photographs(shared_data):
  """500 of 1.3 million: to a tenth in the first eigenvalue, a few degrees in the directions."""
  from PIL import Image

  count, sums, products = 0, np.zeros(3), np.zeros((3, 3))
  for path in sorted((shared_data / 'imagenet_samples').glob('*.JPEG')):
    with Image.open(path) as opened:
      values = np.asarray(opened.convert('RGB').resize((64, 64)), np.float64).reshape(-1, 3)
    count, sums, products = count + len(values), sums + values.sum(0), products + values.T @ values
  found = principal_components(count, sums, products)
  np.testing.assert_allclose(found.eigenvalues, IMAGENET.eigenvalues, rtol=0.25)
  cosines = np.abs(np.sum(np.array(found.eigenvectors) * np.array(IMAGENET.eigenvectors), axis=1))
  assert (cosines > 0.99).all()
