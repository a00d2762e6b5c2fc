"""Layers that flax lacks or computes more slowly: pooling, and the two local response norms.

All take and return [B, H, W, C]. Sums are accumulated in at least float32; results have the input's dtype.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn

from alexnet_flax.models.spec import LocalResponseNorm, Pool, SpatialResponseNorm, window_padding


def pool(x: jax.Array, layer: Pool) -> jax.Array:
  """Applies max or average pooling; an average excludes padding."""
  window, strides = (layer.kernel_size, layer.kernel_size), (layer.strides, layer.strides)
  padding = [window_padding(layer, side) for side in x.shape[1:3]]
  if layer.kind == 'avg':
    mean = nn.avg_pool(at_least_float32(x), window, strides, padding, count_include_pad=False)
    return mean.astype(x.dtype)
  x = jnp.pad(x, [(0, 0), *padding, (0, 0)], constant_values=-jnp.inf)
  return functools.reduce(_first_greatest, _window_slices(x, layer))


def _window_slices(x: jax.Array, layer: Pool) -> Iterator[jax.Array]:
  """Yields, for each position in the window, row by row, the values of all windows at that position.

  XLA fuses their maximum, and its gradient. The gradient of `nn.max_pool` is a select-and-scatter, several
  times slower on CPU (`benchmarks/train_step.py` compares the two).
  """
  spans = [(side - layer.kernel_size) // layer.strides * layer.strides + 1 for side in x.shape[1:3]]
  for top, left in itertools.product(range(layer.kernel_size), repeat=2):
    yield x[:, top : top + spans[0] : layer.strides, left : left + spans[1] : layer.strides]


def _first_greatest(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the maximum. The first of equal values receives the whole gradient; NaN propagates.

  `jnp.maximum` is not used: its gradient tests whether an operand equals the result, and XLA may recompute
  either inside the gradient's fusion with different rounding. Then neither is equal, and the gradient is
  lost (observed on CPU with a batch sharded over eight devices).
  """
  return jnp.where((b > a) | jnp.isnan(b), b, a)


def local_response_norm(x: jax.Array, layer: LocalResponseNorm) -> jax.Array:
  """Computes b = a / (k + alpha * sum a^2)^beta over `size` adjacent channels (2012 paper, section 3.3).

  The window of channel c is c - size // 2 ... c + (size - 1) // 2, clipped at the ends of its group.
  """
  *space, channels = x.shape
  grouped = x.reshape(*space, layer.groups, channels // layer.groups)
  before = layer.size // 2
  pads = [(0, 0)] * x.ndim + [(before, layer.size - 1 - before)]
  squares = jnp.pad(jnp.square(at_least_float32(grouped)), pads)
  parts = (squares[..., start : start + grouped.shape[-1]] for start in range(layer.size))
  return _divide(grouped, functools.reduce(jnp.add, parts), layer).reshape(x.shape)


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
  scale = jnp.power(layer.k + layer.alpha * total, -layer.beta)
  return (at_least_float32(x) * scale).astype(x.dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
  """Converts bfloat16 and float16 to float32."""
  return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
