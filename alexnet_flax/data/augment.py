"""Image operations on the device, inside the step: uint8 images in, the network's input out.

Every random choice is drawn from the step's key, so it is a function of the run's seed and the step.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from alexnet_flax.data.prepare.color_pca import IMAGENET, PrincipalComponents
from alexnet_flax.models.spec import Preprocessing

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Augmentation of training images; 0 switches an operation off.

  Attributes:
    pca_noise: The standard deviation of the principal components' weights (Krizhevsky et al. 2012, section
      4.1: 0.1).
    brightness, contrast, saturation: x, for factors drawn uniformly from 1 - x ... 1 + x (torchvision's
      ColorJitter, in this order).
    hue: x, for rotations of the colour circle drawn uniformly from -x ... x, in turns.
    erasing: The probability with which a rectangle is set to the mean (Zhong et al. 2017).
    mixup: Alpha of the Beta distribution from which a batch's share is drawn (Zhang et al. 2017).
    cutmix: The same (Yun et al. 2019); with both, each batch takes one of them at random.
    components: The principal components of the data set's colours, for `pca_noise`.
  """

  pca_noise: float = 0.0
  brightness: float = dataclasses.field(default=0.0, metadata={'at_most': 1})
  contrast: float = dataclasses.field(default=0.0, metadata={'at_most': 1})
  saturation: float = dataclasses.field(default=0.0, metadata={'at_most': 1})
  hue: float = dataclasses.field(default=0.0, metadata={'at_most': 0.5})
  erasing: float = dataclasses.field(default=0.0, metadata={'at_most': 1})
  mixup: float = 0.0
  cutmix: float = 0.0
  components: PrincipalComponents = dataclasses.field(default=IMAGENET, metadata={'derived': True})

  @property
  def is_on(self) -> bool:
    """Whether any operation is switched on."""
    return dataclasses.replace(self, components=IMAGENET) != Augmentation()


def normalize(batch: Batch, key: jax.Array | None = None, *, preprocessing: Preprocessing) -> Batch:
  """Turns 'image' from uint8 RGB [B, H, W, 3] into the float32 input that a spec asks for.

  The batch's other entries pass through. `key` is unused; every preprocessing function has this signature.
  Raises TypeError for images that are not uint8, as they may have been preprocessed already.
  """
  del key
  return batch | {'image': standardize(_as_float(batch), preprocessing)}


def augment(
  batch: Batch,
  key: jax.Array | None = None,
  *,
  preprocessing: Preprocessing,
  augmentation: Augmentation,
  num_classes: int,
) -> Batch:
  """Applies colour operations, `normalize`, erasing and mixing; without the step's key, `normalize` alone.

  `batch` has 'image' uint8 RGB [B, H, W, 3] and 'label' int32 [B]; labels of mixed images become float32
  [B, num_classes]. Raises TypeError if the images are not uint8.
  """
  if key is None:
    return normalize(batch, preprocessing=preprocessing)
  color_key, pca_key, erasing_key, mixing_key = jax.random.split(key, 4)
  images = _as_float(batch) / 255.0
  keys = jax.random.split(color_key, len(COLOR_OPERATIONS))
  for operation_key, (name, operation) in zip(keys, COLOR_OPERATIONS.items(), strict=True):
    if x := getattr(augmentation, name):
      factors = jax.random.uniform(operation_key, (len(images), 1, 1, 1), minval=1.0 - x, maxval=1.0 + x)
      images = operation(images, factors)
  if augmentation.pca_noise:
    images += _pca_noise(pca_key, len(images), augmentation.pca_noise, augmentation.components)
  images = standardize(images * 255.0, preprocessing)
  if augmentation.erasing:
    images = _erase(images, erasing_key, augmentation.erasing)
  batch = batch | {'image': images}
  if augmentation.mixup or augmentation.cutmix:
    batch = _mix(batch, mixing_key, augmentation.mixup, augmentation.cutmix, num_classes)
  return batch


def _as_float(batch: Batch) -> jax.Array:
  if batch['image'].dtype != jnp.uint8:
    raise TypeError(f'images (of dtype {batch["image"].dtype}) must be uint8')
  return batch['image'].astype(jnp.float32)


def standardize(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
  """Converts RGB in 0 ... 255, float [..., 3], to the network's input."""
  if preprocessing.channel_order == 'BGR':
    images = images[..., ::-1]
  mean, std = (jnp.array(x) for x in (preprocessing.mean, preprocessing.std))
  shape = (1,) * (images.ndim - 1) + (3,)
  return (images * preprocessing.scale - mean.reshape(shape)) / std.reshape(shape)


def _blend(images: jax.Array, others: jax.Array, factors: jax.Array) -> jax.Array:
  return jnp.clip(factors * images + (1.0 - factors) * others, 0.0, 1.0)


def _gray(images: jax.Array) -> jax.Array:
  """Luma (ITU-R BT.601), [B, H, W, 1]."""
  return jnp.sum(images * jnp.array([0.2989, 0.587, 0.114]).reshape(1, 1, 1, 3), axis=-1, keepdims=True)


def _hue(images: jax.Array, factors: jax.Array) -> jax.Array:
  """Rotates the hue by factors - 1 turns, by way of hue, saturation and value (Smith 1978)."""
  value, least = jnp.max(images, axis=-1), jnp.min(images, axis=-1)
  chroma = value - least
  red, green, blue = jnp.moveaxis(images, -1, 0)
  safe = jnp.where(chroma > 0, chroma, 1.0)
  sector = jnp.where(
    value == red,
    (green - blue) / safe,
    jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
  )
  rotated = sector + 6.0 * (factors - 1.0)[..., 0]
  channels = [jnp.mod(offset + rotated, 6.0) for offset in (5.0, 3.0, 1.0)]
  return jnp.stack([value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0) for k in channels], axis=-1)


# Colour operations in the order in which they are applied. Each is a key of `Augmentation` and takes RGB in
# 0 ... 1, [B, H, W, 3], and factors [B, 1, 1, 1] about 1.
COLOR_OPERATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  'brightness': lambda x, factors: _blend(x, jnp.zeros_like(x), factors),
  'contrast': lambda x, factors: _blend(x, jnp.mean(_gray(x), axis=(1, 2, 3), keepdims=True), factors),
  'saturation': lambda x, factors: _blend(x, _gray(x), factors),
  'hue': _hue,
}


def _pca_noise(key: jax.Array, count: int, stddev: float, components: PrincipalComponents) -> jax.Array:
  """Draws one colour per image, [B, 1, 1, 3]: the sum of components times eigenvalue times N(0, stddev)."""
  weights = stddev * jax.random.normal(key, (count, 3))
  scaled = np.array(components.eigenvalues)[:, None] * np.array(components.eigenvectors)
  return jnp.matmul(weights, scaled.astype(np.float32), precision='highest')[:, None, None, :]


def _erase(images: jax.Array, key: jax.Array, share: float) -> jax.Array:
  """Sets a rectangle of 2 ... 33 % of the area, of an aspect ratio between 0.3 and 1 / 0.3, to 0."""
  count, height, width, _ = images.shape
  shape = jnp.array([[height, width]], jnp.float32)
  chosen_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
  chosen = jax.random.bernoulli(chosen_key, share, (count,))
  area = jax.random.uniform(area_key, (count,), minval=0.02, maxval=0.33) * (height * width)
  ratio = jnp.exp(jax.random.uniform(ratio_key, (count,), minval=np.log(0.3), maxval=-np.log(0.3)))
  sides = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], axis=-1)
  sides = jnp.minimum(jnp.round(sides), shape)
  corner = jnp.floor(jax.random.uniform(place_key, (count, 2)) * (shape - sides + 1.0))
  inside = _inside(corner, corner + sides, height, width) & chosen[:, None, None]
  return jnp.where(inside[..., None], 0.0, images)


def _mix(batch: Batch, key: jax.Array, mixup: float, cutmix: float, num_classes: int) -> Batch:
  """Mixes each image with the one before it in the batch, and their labels likewise."""
  share_key, place_key, which_key = jax.random.split(key, 3)
  images = batch['image']
  others, (height, width) = _neighbours(images), images.shape[1:3]
  cuts = jax.random.bernoulli(which_key) if mixup and cutmix else jnp.array(bool(cutmix))
  alpha = jnp.where(cuts, cutmix or 1.0, mixup or 1.0)
  share = jax.random.beta(share_key, alpha, alpha)

  shape = jnp.array([[height, width]], jnp.float32)
  sides, center = jnp.sqrt(1.0 - share) * shape, jax.random.uniform(place_key, (1, 2)) * shape
  inside = _inside(jnp.round(center - sides / 2.0), jnp.round(center + sides / 2.0), height, width)[..., None]
  share = jnp.where(cuts, 1.0 - jnp.mean(inside.astype(jnp.float32)), share)
  mixed = jnp.where(cuts, jnp.where(inside, others, images), share * images + (1.0 - share) * others)
  labels = jax.nn.one_hot(batch['label'], num_classes)
  return batch | {'image': mixed, 'label': share * labels + (1.0 - share) * _neighbours(labels)}


def _neighbours(x: jax.Array) -> jax.Array:
  """Returns the example before each, also on a mesh with explicit axes, for which `roll` is not written."""
  roll, sharding = functools.partial(jnp.roll, shift=1, axis=0), jax.typeof(x).sharding
  if AxisType.Explicit in sharding.mesh.axis_types:
    return jax.sharding.auto_axes(roll, out_sharding=sharding)(x)
  return roll(x)


def _inside(first: jax.Array, last: jax.Array, height: int, width: int) -> jax.Array:
  """Returns which pixels lie in the boxes [first, last), each float [B, 2]: bool [B, H, W]."""
  rows, columns = (jnp.arange(side, dtype=jnp.float32)[None] for side in (height, width))
  within_rows = (rows >= first[:, :1]) & (rows < last[:, :1])
  within_columns = (columns >= first[:, 1:]) & (columns < last[:, 1:])
  return within_rows[:, :, None] & within_columns[:, None, :]
