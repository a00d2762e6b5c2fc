"""Layers that flax lacks or computes more slowly: pooling, local convolutions, the two local response norms.

All take and return [B, H, W, C]. Pools and norms accumulate sums in at least float32; their results have the
input's dtype.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType

from alexnet_flax.models.cpu_conv import on_one_device
from alexnet_flax.models.pooling import max_pool
from alexnet_flax.models.spec import (
  Conv,
  LocalResponseNorm,
  Pool,
  SpatialResponseNorm,
  output_side,
  window_padding,
)

_Sums = Callable[[jax.Array, int], jax.Array]

# A product on CPUs is computed in so many parts for so many rows, and for so many numbers of the kernel or
# more: measured (docs/performance.md).
_PARTS, _ROWS, _LARGE = 16, range(8, 49), 16_000_000


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0). `nn.relu`, but its derivative needs the result alone, so that x need not be stored."""
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  result = relu(*primals)
  return result, jnp.where(result != 0, *tangents, jnp.zeros_like(result))


def leave_kernel(
  *arrays: jax.Array | None, dtype: Any = None, inexact: bool = True
) -> list[jax.Array | None]:
  """Converts input and bias, not the kernel between them: `promote_dtype` of a linen layer with `product`."""
  del inexact
  x, kernel, bias = arrays
  return [None if x is None else x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)]


def product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
  """Multiplies x [B, K] by a kernel [K, N] of another type, as `dot_general` of a linen layer."""
  return kernel_product(x, kernel)


@jax.custom_jvp
def kernel_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x @ kernel in the type of x, multiplied in the wider of the two types.

  x is converted, not the kernel: a converted copy of a large kernel would be written once and read twice, in
  the forward and in the backward pass. Devices multiply float32 at their default precision: TF32 on GPUs,
  bfloat16 on TPUs.
  """
  return _in_the_wider(_matmul, x, kernel)


def _in_the_wider(multiply: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies in the wider of the two types; returns that of x."""
  wide = max(x.dtype, kernel.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
  return multiply(x.astype(wide), kernel.astype(wide)).astype(x.dtype)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x @ kernel; on CPUs, of a large kernel by a few rows, as a sum of products.

  XLA's library there copies a kernel into tiles first. The tiles of a part stay in the cache.
  """
  if x.ndim != 2 or x.dtype != jnp.float32 or not on_one_device(x, kernel):
    return x @ kernel
  rows, length = x.shape
  if rows not in _ROWS or length % _PARTS or kernel.size < _LARGE:
    return x @ kernel

  def in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    parts = x.reshape(rows, _PARTS, -1).swapaxes(0, 1), kernel.reshape(_PARTS, -1, kernel.shape[1])
    start = jnp.zeros((rows, kernel.shape[1]), x.dtype)
    return jax.lax.scan(lambda total, part: (total + part[0] @ part[1], None), start, parts)[0]

  return jax.lax.platform_dependent(x, kernel, cpu=in_parts, default=jnp.matmul)


@kernel_product.defjvp
def _kernel_product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
  tangent = _in_the_wider(jnp.matmul, x_tangent, kernel) + x @ kernel_tangent.astype(x.dtype)
  return kernel_product(x, kernel), tangent


class LocalConv(nn.Module):
  """A convolution with a kernel and biases of its own at each place.

  `nn.ConvLocal`, in a sixth of the time on CPUs. Its kernel has shape [H, W, K, K, C, F] and its bias
  [H, W, F], for outputs [B, H, W, F].

  Attributes:
    layer: The window and the number of features F.
    dtype: The type of the arithmetic and the outputs.
    kernel_init: Initialises the kernel; a fan is that of one place.
    bias_init: Initialises the biases.
  """

  layer: Conv
  dtype: Any
  kernel_init: Callable[..., jax.Array]
  bias_init: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size, strides, channels = self.layer.kernel_size, self.layer.strides, x.shape[-1]
    rows, columns = [output_side(self.layer, side) for side in x.shape[1:3]]
    kernel_shape = (rows, columns, size, size, channels, self.layer.features)
    kernel = self.param('kernel', self.kernel_init, kernel_shape, jnp.float32)
    bias = self.param('bias', self.bias_init, (rows, columns, self.layer.features), jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    x = jnp.pad(x, [(0, 0), *(window_padding(self.layer, side) for side in x.shape[1:3]), (0, 0)])
    spans = [max(0, (count - 1) * strides + 1) for count in (rows, columns)]
    down, right = ([slice(first, first + span, strides) for first in range(size)] for span in spans)
    windows = jnp.stack([x[:, i, j] for i in down for j in right], axis=3)
    taps = kernel.reshape(rows, columns, size * size, channels, self.layer.features)
    return jnp.einsum('bhwtc,hwtcf->bhwf', windows, taps) + bias[None]


def pool(x: jax.Array, layer: Pool) -> jax.Array:
  """Applies max or average pooling, or both and takes their mean; an average excludes padding."""
  match layer.kind:
    case 'max':
      return max_pool(x, layer)
    case 'avg':
      return _mean(x, layer).astype(x.dtype)
    case 'max+avg':
      return ((at_least_float32(max_pool(x, layer)) + _mean(x, layer)) / 2).astype(x.dtype)
    case _:
      assert_never(layer.kind)


def _mean(x: jax.Array, layer: Pool) -> jax.Array:
  pads = [window_padding(layer, side) for side in x.shape[1:3]]
  sums = _window_sums(at_least_float32(x), layer.kernel_size, layer.strides, pads)
  rows, columns = (
    _values_per_window(side, layer, before) for side, (before, _) in zip(x.shape[1:3], pads, strict=True)
  )
  return sums / np.outer(rows, columns)[None, ..., None]


def _values_per_window(side: int, layer: Pool, before: int) -> np.ndarray:
  """Returns how many rows, or columns, of the image itself are in each window along a side, float32."""
  first = np.arange(output_side(layer, side)) * layer.strides - before
  inside = np.minimum(first + layer.kernel_size, side) - np.maximum(first, 0)
  return inside.astype(np.float32)


def _window_sums(x: jax.Array, size: int, strides: int, pads: Sequence[tuple[int, int]]) -> jax.Array:
  """Sums windows of size x size values of padded images [B, H, W, C].

  On CPUs one side after the other, as sums of slices: `reduce_window` takes six times as long there, and its
  derivative more.
  """

  def by_side(x: jax.Array) -> jax.Array:
    for axis, pad in enumerate(pads, start=1):
      before = (slice(None),) * axis
      x = jnp.pad(x, [pad if dimension == axis else (0, 0) for dimension in range(x.ndim)])
      span = max(0, x.shape[axis] - size + 1)
      places = (slice(first, first + span, strides) for first in range(size))
      x = functools.reduce(jnp.add, (x[*before, place] for place in places))
    return x

  def whole(x: jax.Array) -> jax.Array:
    window, padding = (1, size, size, 1), ((0, 0), *pads, (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, strides, strides, 1), padding)

  return jax.lax.platform_dependent(x, cpu=by_side, default=whole)


def local_response_norm(x: jax.Array, layer: LocalResponseNorm) -> jax.Array:
  """Computes b = a / (k + alpha * sum a^2)^beta over `size` adjacent channels (2012 paper, section 3.3).

  The window of channel c is c - size // 2 ... c + (size - 1) // 2, clipped at the ends of its group.
  """
  *space, channels = x.shape
  grouped = at_least_float32(x).reshape(*space, layer.groups, channels // layer.groups)
  return _response_norm(grouped, layer, _slice_sums, _channel_sums).reshape(x.shape).astype(x.dtype)


def _slice_sums(x: jax.Array, size: int) -> jax.Array:
  """Sums `size` adjacent values on the last axis."""
  channels, before = x.shape[-1], size // 2
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)])
  return functools.reduce(jnp.add, (padded[..., start : start + channels] for start in range(size)))


def _channel_sums(x: jax.Array, size: int) -> jax.Array:
  """The same, on CPUs by multiplying with a matrix of zeros and ones: its transpose is as fast.

  There the derivative of slices along the last axis took most of the step: five times the convolutions.
  """

  def product(x: jax.Array) -> jax.Array:
    offsets = np.subtract.outer(np.arange(x.shape[-1]), np.arange(x.shape[-1]))
    band = jnp.asarray((offsets >= -(size // 2)) & (offsets < size - size // 2), x.dtype)
    return jax.lax.dot_general(x, band, (((x.ndim - 1,), (0,)), ((), ())))

  return jax.lax.platform_dependent(x, cpu=product, default=functools.partial(_slice_sums, size=size))


def spatial_response_norm(x: jax.Array, layer: SpatialResponseNorm) -> jax.Array:
  """Computes b = a / (k + alpha * sum a^2)^beta over a size x size window of the same channel.

  The window is clipped at the image's border (the 2012 program's layer 'rnorm').
  """

  def sums(x: jax.Array, size: int) -> jax.Array:
    return _window_sums(x, size, 1, [(size // 2, size - 1 - size // 2)] * 2)

  return _response_norm(at_least_float32(x), layer, sums, sums).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _response_norm(
  x: jax.Array, layer: LocalResponseNorm | SpatialResponseNorm, sums: _Sums, transposable_sums: _Sums
) -> jax.Array:
  """Computes x / (k + alpha * sums(x^2))^beta; its derivative needs no more than x and the sums.

  Backwards, `transposable_sums` are computed, which are the same.
  """
  del transposable_sums
  return x * _scale(layer.k + layer.alpha * sums(jnp.square(x), layer.size), layer.beta)


@_response_norm.defjvp
def _response_norm_jvp(
  layer: Any, sums: _Sums, transposable_sums: _Sums, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  total = layer.k + layer.alpha * sums(jnp.square(x), layer.size)
  scale = _scale(total, layer.beta)
  change = 2 * layer.alpha * layer.beta * transposable_sums(x * tangent, layer.size)
  return x * scale, scale * tangent - x * scale / total * change


def _scale(total: jax.Array, beta: float) -> jax.Array:
  if beta != 0.75:
    return jnp.power(total, -beta)
  root = jax.lax.rsqrt(total)  # roots are faster
  return root * jnp.sqrt(root)


class Dropout(nn.Module):
  """`nn.Dropout`, with the same random numbers, also for meshes with explicit axes.

  There a mask must be sharded as what it is applied to; `nn.Dropout`'s is not.

  Attributes:
    rate: The probability, less than 1, with which a value becomes 0; the others are divided by 1 - rate.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if not train or self.rate == 0:
      return x
    kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.rate, x.shape)
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
      kept = jax.sharding.reshard(kept, sharding)
    return jnp.where(kept, x / (1 - self.rate), 0.0)


def at_least_float32(x: jax.Array) -> jax.Array:
  """Converts bfloat16 and float16 to float32."""
  return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
