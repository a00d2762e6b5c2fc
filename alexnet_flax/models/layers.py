"""Layers that flax lacks or computes more slowly: pooling, and the two local response norms.

All take and return [B, H, W, C]. Sums are accumulated in at least float32; results have the input's dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from alexnet_flax.models.pooling import max_pool
from alexnet_flax.models.spec import LocalResponseNorm, Pool, SpatialResponseNorm, window_padding


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
  wide = max(x.dtype, kernel.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
  return (x.astype(wide) @ kernel.astype(wide)).astype(x.dtype)


@kernel_product.defjvp
def _kernel_product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
  tangent = kernel_product(x_tangent, kernel) + x @ kernel_tangent.astype(x.dtype)
  return kernel_product(x, kernel), tangent


def pool(x: jax.Array, layer: Pool) -> jax.Array:
  """Applies max or average pooling; an average excludes padding."""
  if layer.kind == 'max':
    return max_pool(x, layer)
  window, strides = (layer.kernel_size, layer.kernel_size), (layer.strides, layer.strides)
  padding = [window_padding(layer, side) for side in x.shape[1:3]]
  mean = nn.avg_pool(at_least_float32(x), window, strides, padding, count_include_pad=False)
  return mean.astype(x.dtype)


def local_response_norm(x: jax.Array, layer: LocalResponseNorm) -> jax.Array:
  """Computes b = a / (k + alpha * sum a^2)^beta over `size` adjacent channels (2012 paper, section 3.3).

  The window of channel c is c - size // 2 ... c + (size - 1) // 2, clipped at the ends of its group.
  """
  *space, channels = x.shape
  grouped = x.reshape(*space, layer.groups, channels // layer.groups)
  total = _channel_sums(jnp.square(at_least_float32(grouped)), layer.size)
  return _divide(grouped, total, layer).reshape(x.shape)


def _channel_sums(x: jax.Array, size: int) -> jax.Array:
  """Sums `size` adjacent values on the last axis, on CPUs by multiplying with a matrix of zeros and ones.

  There the derivative of slices along the last axis took most of the step: five times the convolutions.
  """
  channels, before = x.shape[-1], size // 2

  def product(x: jax.Array) -> jax.Array:
    offsets = np.subtract.outer(np.arange(channels), np.arange(channels))
    band = jnp.asarray((offsets >= -before) & (offsets < size - before), x.dtype)
    return jax.lax.dot_general(x, band, (((x.ndim - 1,), (0,)), ((), ())))

  def slices(x: jax.Array) -> jax.Array:
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)])
    return functools.reduce(jnp.add, (padded[..., start : start + channels] for start in range(size)))

  return jax.lax.platform_dependent(x, cpu=product, default=slices)


def spatial_response_norm(x: jax.Array, layer: SpatialResponseNorm) -> jax.Array:
  """Computes b = a / (k + alpha * sum a^2)^beta over a size x size window of the same channel.

  The window is clipped at the image's border (the 2012 program's layer 'rnorm').
  """
  before = layer.size // 2
  pads = (before, layer.size - 1 - before)
  window, padding = (1, layer.size, layer.size, 1), ((0, 0), pads, pads, (0, 0))
  squares = jnp.square(at_least_float32(x))
  total = jax.lax.reduce_window(squares, 0.0, jax.lax.add, window, (1, 1, 1, 1), padding)
  return _divide(x, total, layer)


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
    kept |= jnp.zeros_like(x, bool)  # takes over the sharding of x
    return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


def _divide(x: jax.Array, total: jax.Array, layer: LocalResponseNorm | SpatialResponseNorm) -> jax.Array:
  total = layer.k + layer.alpha * total
  root = jax.lax.rsqrt(total)
  scale = root * jnp.sqrt(root) if layer.beta == 0.75 else jnp.power(total, -layer.beta)  # roots are faster
  return (at_least_float32(x) * scale).astype(x.dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
  """Converts bfloat16 and float16 to float32."""
  return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
