"""Arithmetic on images on the device, inside the step: bytes in, the network's input out.

Every random choice is drawn from the step's key, so it is a function of the run's seed and the step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.prepare.color_pca import IMAGENET, PrincipalComponents
from alexnet_flax.models.spec import Preprocessing

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What is done to pixels in training; 0 is nothing.

  Attributes:
    pca_noise: of the standard deviation of the principal components' weights (Krizhevsky et al. 2012,
      section 4.1: 0.1); `components` are needed for it.
    brightness, contrast, saturation: x, for factors drawn evenly from 1 - x ... 1 + x (torchvision's
      ColorJitter, in this order).
    hue: x, for turns of the colour circle drawn evenly from -x ... x.
    erasing: share of the images of which a rectangle is set to the mean (Zhong et al. 2017).
    mixup: alpha of the Beta distribution from which a batch's share is drawn (Zhang et al. 2017).
    cutmix: the same (Yun et al. 2019); with both, each batch takes one of them at random.
    components: of the data set.
  """

  pca_noise: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  erasing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  components: PrincipalComponents = IMAGENET


def normalize(batch: Batch, key: jax.Array | None = None, *, preprocessing: Preprocessing) -> Batch:
  """Turns 'image' from uint8 RGB [B, H, W, 3] into the float32 input that a spec asks for.

  Args:
    batch: with 'image'; other entries pass through.
    key: unused; every preprocessing has this signature.
    preprocessing: of the spec.

  Raises:
    TypeError: the images are not uint8, so have perhaps been preprocessed already.
  """
  del key
  return batch | {'image': _standardized(_bytes(batch), preprocessing)}


def augment(
  batch: Batch,
  key: jax.Array | None = None,
  *,
  preprocessing: Preprocessing,
  augmentation: Augmentation,
  num_classes: int,
) -> Batch:
  """Colours, erasing and mixing, and then what `normalize` does.

  Args:
    batch: 'image' uint8 RGB [B, H, W, 3], 'label' int32 [B].
    key: of the step; None for `normalize` alone.
    preprocessing: of the spec.
    augmentation: what to do.
    num_classes: C, of the distributions that mixed labels are.

  Returns:
    The batch, whose 'label' is float32 [B, C] if images are mixed.

  Raises:
    TypeError: the images are not uint8.
  """
  if key is None:
    return normalize(batch, preprocessing=preprocessing)
  color_key, pca_key, erasing_key, mixing_key = jax.random.split(key, 4)
  images = _jittered(_bytes(batch) / 255.0, color_key, augmentation)
  if augmentation.pca_noise:
    images += _pca_noise(pca_key, len(images), augmentation.pca_noise, augmentation.components)
  images = _standardized(images * 255.0, preprocessing)
  if augmentation.erasing:
    images = _erased(images, erasing_key, augmentation.erasing)
  batch = batch | {'image': images}
  if augmentation.mixup or augmentation.cutmix:
    batch = _mixed(batch, mixing_key, augmentation.mixup, augmentation.cutmix, num_classes)
  return batch


def _bytes(batch: Batch) -> jax.Array:
  """The images in 0 ... 255, as float32."""
  if batch['image'].dtype != jnp.uint8:
    raise TypeError(f'images (of dtype {batch["image"].dtype}) must be uint8')
  return batch['image'].astype(jnp.float32)


def _standardized(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
  """What the network is given of RGB in 0 ... 255."""
  if preprocessing.channel_order == 'BGR':
    images = images[..., ::-1]
  mean, std = (jnp.array(x) for x in (preprocessing.mean, preprocessing.std))
  shape = (1,) * (images.ndim - 1) + (3,)
  return (images * preprocessing.scale - mean.reshape(shape)) / std.reshape(shape)


def _jittered(images: jax.Array, key: jax.Array, augmentation: Augmentation) -> jax.Array:
  """Brightness, contrast, saturation and hue, each clipped to 0 ... 1."""
  keys, shape = jax.random.split(key, 4), (len(images), 1, 1, 1)

  def factors(key: jax.Array, x: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=1.0 - x, maxval=1.0 + x)

  if augmentation.brightness:
    images = _blend(images, jnp.zeros_like(images), factors(keys[0], augmentation.brightness))
  if augmentation.contrast:
    means = jnp.mean(_gray(images), axis=(1, 2, 3), keepdims=True)
    images = _blend(images, means, factors(keys[1], augmentation.contrast))
  if augmentation.saturation:
    images = _blend(images, _gray(images), factors(keys[2], augmentation.saturation))
  if augmentation.hue:
    turns = factors(keys[3], augmentation.hue) - 1.0
    images = _hue_turned(images, turns[..., 0])
  return images


def _blend(images: jax.Array, others: jax.Array, factors: jax.Array) -> jax.Array:
  return jnp.clip(factors * images + (1.0 - factors) * others, 0.0, 1.0)


def _gray(images: jax.Array) -> jax.Array:
  """Luma (ITU-R BT.601), [B, H, W, 1]."""
  return jnp.sum(images * jnp.array([0.2989, 0.587, 0.114]).reshape(1, 1, 1, 3), axis=-1, keepdims=True)


def _hue_turned(images: jax.Array, turns: jax.Array) -> jax.Array:
  """RGB to hue, saturation and value (Smith 1978), the hue turned, and back."""
  value, least = jnp.max(images, axis=-1), jnp.min(images, axis=-1)
  chroma = value - least
  red, green, blue = jnp.moveaxis(images, -1, 0)
  safe = jnp.where(chroma > 0, chroma, 1.0)
  sector = jnp.where(
    value == red,
    (green - blue) / safe,
    jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
  )
  turned = sector + 6.0 * turns
  channels = [jnp.mod(offset + turned, 6.0) for offset in (5.0, 3.0, 1.0)]
  return jnp.stack([value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0) for k in channels], axis=-1)


def _pca_noise(key: jax.Array, count: int, stddev: float, components: PrincipalComponents) -> jax.Array:
  """One colour an image, [B, 1, 1, 3]: sum of components times eigenvalue times N(0, stddev)."""
  weights = stddev * jax.random.normal(key, (count, 3))
  scaled = np.array(components.eigenvalues)[:, None] * np.array(components.eigenvectors)
  return jnp.matmul(weights, scaled.astype(np.float32), precision='highest')[:, None, None, :]


def _erased(images: jax.Array, key: jax.Array, share: float) -> jax.Array:
  """A rectangle of 2 ... 33 % of the area, its shape between 0.3 and 1 / 0.3, set to 0."""
  count, height, width, _ = images.shape
  chosen_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
  chosen = jax.random.bernoulli(chosen_key, share, (count,))
  area = jax.random.uniform(area_key, (count,), minval=0.02, maxval=0.33) * (height * width)
  ratio = jnp.exp(jax.random.uniform(ratio_key, (count,), minval=np.log(0.3), maxval=-np.log(0.3)))
  sides = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], axis=-1)
  sides = jnp.minimum(jnp.round(sides), jnp.array([[height, width]], jnp.float32))
  spare = jnp.array([[height, width]], jnp.float32) - sides
  corner = jnp.floor(jax.random.uniform(place_key, (count, 2)) * (spare + 1.0))
  inside = _inside(corner, corner + sides, height, width) & chosen[:, None, None]
  return jnp.where(inside[..., None], 0.0, images)


def _mixed(batch: Batch, key: jax.Array, mixup: float, cutmix: float, num_classes: int) -> Batch:
  """Each image with the one before it in the batch, and their labels likewise."""
  share_key, place_key, which_key = jax.random.split(key, 3)
  images = batch['image']
  others, (height, width) = jnp.roll(images, 1, axis=0), images.shape[1:3]
  cuts = jnp.array(bool(cutmix))
  if mixup and cutmix:
    cuts = jax.random.bernoulli(which_key)
  alpha = jnp.where(cuts, cutmix or 1.0, mixup or 1.0)
  share = jax.random.beta(share_key, alpha, alpha)

  sides = jnp.sqrt(1.0 - share) * jnp.array([[height, width]], jnp.float32)
  center = jax.random.uniform(place_key, (1, 2)) * jnp.array([[height, width]], jnp.float32)
  inside = _inside(jnp.round(center - sides / 2.0), jnp.round(center + sides / 2.0), height, width)[..., None]
  share = jnp.where(cuts, 1.0 - jnp.mean(inside.astype(jnp.float32)), share)
  mixed = jnp.where(cuts, jnp.where(inside, others, images), share * images + (1.0 - share) * others)
  labels = jax.nn.one_hot(batch['label'], num_classes)
  return batch | {'image': mixed, 'label': share * labels + (1.0 - share) * jnp.roll(labels, 1, axis=0)}


def _inside(first: jax.Array, last: jax.Array, height: int, width: int) -> jax.Array:
  """Which pixels lie in boxes [first, last), each float [B, 2]: bool [B, H, W]."""
  rows = jnp.arange(height, dtype=jnp.float32)[None]
  columns = jnp.arange(width, dtype=jnp.float32)[None]
  within_rows = (rows >= first[:, :1]) & (rows < last[:, :1])
  within_columns = (columns >= first[:, 1:]) & (columns < last[:, 1:])
  return within_rows[:, :, None] & within_columns[:, None, :]
