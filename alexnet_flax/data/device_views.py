"""The views of `views.py` made on the device: whole uint8 images of one size in, views out.

A view that only crops is a slice. Any other is two matrix products, by the weights of the image's rows and of
its columns in each of the view's: bilinear, or averages over areas below half the size, as OpenCV's `resize`.
The weights of whole pixels are 0 and 1, so cropping, mirroring and borders are exact.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alexnet_flax.data.views import TrainView

Batch = dict[str, jax.Array]


def view_maker(view: TrainView, height: int, width: int) -> Callable[[Batch], Batch]:
  """Returns a jitted function from a batch of whole images to the batch of their views.

  The images are 'image' uint8 [B, height, width, 3], their windows 'box' int32 [B, 4] (top, left, height,
  width) and 'mirrored' bool [B]; the views are 'image' uint8 [B, S, S, 3], within a level of those of
  `decode.decode_train`. Other entries pass through.
  """
  if view.copies_pixels(height, width):
    make = functools.partial(_sliced, size=view.image_size)
  else:
    fill = view.rotation_fill
    make = functools.partial(_resized, size=view.image_size, fill=fill)

  @jax.jit
  def views(batch: Batch) -> Batch:
    others = dict(batch)
    images, boxes, mirrored = (others.pop(name) for name in ('image', 'box', 'mirrored'))
    return others | {'image': jax.vmap(make)(images, boxes, mirrored)}

  return views


def _sliced(image: jax.Array, box: jax.Array, mirrored: jax.Array, *, size: int) -> jax.Array:
  view = jax.lax.dynamic_slice(image, (box[0], box[1], jnp.int32(0)), (size, size, 3))
  return jnp.where(mirrored, view[:, ::-1], view)


def _resized(
  image: jax.Array, box: jax.Array, mirrored: jax.Array, *, size: int, fill: tuple[float, float, float]
) -> jax.Array:
  height, width, _ = image.shape
  shrinks = jnp.min(box[2:]) > 2 * size
  rows = _weights(box[0], box[2], height, size, shrinks)
  columns = _weights(box[1], box[3], width, size, shrinks)
  columns = jnp.where(mirrored, columns[::-1], columns)
  product = functools.partial(jnp.einsum, precision='highest')
  view = product('ih,jw,hwc->ijc', rows, columns, image.astype(jnp.float32))
  inside = jnp.sum(rows, axis=1)[:, None, None] * jnp.sum(columns, axis=1)[None, :, None]
  view += (1.0 - inside) * jnp.array(fill, jnp.float32)[None, None]
  return jnp.clip(jnp.floor(view + 0.5), 0.0, 255.0).astype(jnp.uint8)


def _weights(start: jax.Array, length: jax.Array, side: int, size: int, shrinks: jax.Array) -> jax.Array:
  """Returns the weights of an image's pixels in a view's, float32 [size, side], along one side.

  The rows sum to 1, less what lies outside the image.
  """
  scale = length.astype(jnp.float32) / size
  pixels = (jnp.arange(side) - start).astype(jnp.float32)[None]  # from the window's first
  first = jnp.arange(size, dtype=jnp.float32)[:, None] * scale
  centers = jnp.clip(first + (0.5 * scale - 0.5), 0.0, length.astype(jnp.float32) - 1.0)
  bilinear = jnp.maximum(1.0 - jnp.abs(centers - pixels), 0.0)
  shared = jnp.minimum(first + scale, pixels + 1.0) - jnp.maximum(first, pixels)
  weights = jnp.where(shrinks, jnp.maximum(shared, 0.0) / scale, bilinear)
  is_inside = (pixels >= 0.0) & (pixels < length.astype(jnp.float32))
  return jnp.where(is_inside, weights, 0.0)
