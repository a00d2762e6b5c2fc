"""Arithmetic on pictures on the device, inside the step: bytes in, the network's input out."""

import jax
import jax.numpy as jnp

from alexnet_flax.specs import Preprocessing

Batch = dict[str, jax.Array]


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
  images = batch['image']
  if images.dtype != jnp.uint8:
    raise TypeError(f'images (of dtype {images.dtype}) must be uint8')
  if preprocessing.channel_order == 'BGR':
    images = images[..., ::-1]
  mean, std = (jnp.array(x).reshape(1, 1, 1, 3) for x in (preprocessing.mean, preprocessing.std))
  pixels = (images.astype(jnp.float32) * preprocessing.scale - mean) / std
  return batch | {'image': pixels}
