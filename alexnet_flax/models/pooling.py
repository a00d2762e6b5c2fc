"""Max pooling whose derivative keeps one small index for each window.

`nn.max_pool` has a select-and-scatter for a derivative: several times slower on CPUs, not deterministic on
GPUs (google/flax#4233), but one fast instruction of TPUs. Autodiff of a maximum of slices keeps, or computes
again, eight masks. So everywhere but on TPUs the position of each window's maximum is kept, in one byte.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType

from alexnet_flax.models.spec import Pool, window_padding


def max_pool(x: jax.Array, layer: Pool, rectified: bool = False) -> jax.Array:
  """Applies max pooling. The first of equal values receives the whole gradient; NaN propagates.

  Args:
    x: [B, H, W, C].
    layer: Window, strides and padding.
    rectified: Whether to return the pool of relu(x): the same as relu of the pool, for a quarter of the work,
      and its derivative need not know x.
  """
  return _max_pool(x, layer, rectified)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, layer: Pool, rectified: bool) -> jax.Array:
  return jax.lax.platform_dependent(
    x,
    tpu=functools.partial(_reduce_window, layer=layer, rectified=rectified),
    default=lambda x: _greatest(x, layer, rectified)[0],
  )


@_max_pool.defjvp
def _max_pool_jvp(layer: Pool, rectified: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  whole = functools.partial(_reduce_window, layer=layer, rectified=rectified)
  pooled, index = jax.lax.platform_dependent(
    x,
    tpu=lambda x: (pooled := whole(x), _no_index(pooled, layer)),
    default=functools.partial(_greatest, layer=layer, rectified=rectified),
  )
  tangent = jax.lax.platform_dependent(
    x,
    index,
    tangent,
    tpu=lambda x, index, tangent: jax.jvp(whole, (x,), (tangent,))[1],
    default=lambda x, index, tangent: _selected(index, tangent, layer),
  )
  return pooled, tangent


def _exceeds(b: jax.Array, a: jax.Array) -> jax.Array:
  return (b > a) | jnp.isnan(b)


def _greatest(x: jax.Array, layer: Pool, rectified: bool) -> tuple[jax.Array, jax.Array]:
  """Returns the maximum of each window and its place in the window, row by row.

  If it will be rectified away, the place is one past the last: nothing flows back.
  """
  first, *rest = _slices(x, layer)
  greatest, index = first, _no_index(first, layer)
  for place, values in enumerate(rest, start=1):
    greater = _exceeds(values, greatest)
    greatest = jnp.where(greater, values, greatest)
    index = jnp.where(greater, index.dtype.type(place), index)
  if rectified:
    index = jnp.where(greatest <= 0, index.dtype.type(layer.kernel_size**2), index)
    greatest = nn.relu(greatest)
  return greatest, index


def _no_index(like: jax.Array, layer: Pool) -> jax.Array:
  return jnp.zeros_like(like, jnp.uint8 if layer.kernel_size < 16 else jnp.int32)


def _selected(index: jax.Array, x: jax.Array, layer: Pool) -> jax.Array:
  """Returns the value at each window's index: linear in x, so that JAX can transpose it."""
  slices = functools.partial(_selected_by_slices, layer=layer)
  if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:  # blocks would need their sharding stated
    return slices(index, x)
  blocks = functools.partial(_selected_by_blocks, layer=layer)
  return jax.lax.platform_dependent(index, x, cpu=blocks, default=slices)


def _selected_by_slices(index: jax.Array, x: jax.Array, layer: Pool) -> jax.Array:
  parts = (
    jnp.where(index == index.dtype.type(place), values, jnp.zeros_like(values))
    for place, values in enumerate(_slices(x, layer, 0))
  )
  return functools.reduce(jnp.add, parts)


def _selected_by_blocks(index: jax.Array, x: jax.Array, layer: Pool) -> jax.Array:
  """Transposed, each value of the image gathers from the few windows that it lies in, in one pass.

  The image is cut into blocks with sides of `strides`: a window that begins in a block reaches into few after
  it. XLA's CPU compiler would otherwise write one padded array for each place in the window, and add them up.
  """
  size, strides, (rows, columns) = layer.kernel_size, layer.strides, index.shape[1:3]
  after = -(-size // strides) - 1  # blocks
  sides = zip(index.shape[1:3], x.shape[1:3], strict=True)
  spans = [((count + after) * strides, window_padding(layer, side)[0], side) for count, side in sides]
  pads = [(before, span - before - side, 0) for span, before, side in spans]
  x = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
  x = x.reshape(x.shape[0], rows + after, strides, columns + after, strides, x.shape[3])
  nowhere = np.iinfo(index.dtype).max  # no place in a window
  around = [(0, 0, 0), (after, after, 0), (after, after, 0), (0, 0, 0)]
  begun = jax.lax.pad(index, index.dtype.type(nowhere - 1), around)
  total = jnp.zeros_like(x, shape=index.shape)
  for down, right in itertools.product(range(after + 1), repeat=2):
    above, left = after - down, after - right
    windows = begun[:, above : above + rows + after, None, left : left + columns + after, None]
    places = _places(layer, down, right, nowhere).astype(index.dtype)[None, None, :, None, :, None]
    values = jnp.where(windows == places, x, jnp.zeros_like(x)).sum((2, 4))
    total += values[:, down : down + rows, right : right + columns]
  return total


def _places(layer: Pool, down: int, right: int, nowhere: int) -> np.ndarray:
  """Returns the places [strides, strides] in a window of a block further down and right."""
  row, column = (block * layer.strides + np.arange(layer.strides) for block in (down, right))
  inside = (row < layer.kernel_size)[:, None] & (column < layer.kernel_size)
  return np.where(inside, row[:, None] * layer.kernel_size + column, nowhere)


def _slices(x: jax.Array, layer: Pool, padding: float = -np.inf) -> list[jax.Array]:
  """Returns, for each position in the window, row by row, the values of all windows at that position."""
  pads = [window_padding(layer, side) for side in x.shape[1:3]]
  x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=padding)
  spans = [(side - layer.kernel_size) // layer.strides * layer.strides + 1 for side in x.shape[1:3]]
  return [
    x[:, top : top + spans[0] : layer.strides, left : left + spans[1] : layer.strides]
    for top, left in itertools.product(range(layer.kernel_size), repeat=2)
  ]


def _reduce_window(x: jax.Array, layer: Pool, rectified: bool) -> jax.Array:
  x = nn.relu(x) if rectified else x
  pads = [window_padding(layer, side) for side in x.shape[1:3]]
  return nn.max_pool(x, (layer.kernel_size,) * 2, (layer.strides,) * 2, pads)
