"""Batch normalization (Ioffe and Szegedy 2015), together with the max pooling that follows it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from alexnet_flax.models.layers import at_least_float32
from alexnet_flax.models.pooling import max_pool
from alexnet_flax.models.spec import Pool


class BatchNorm(nn.Module):
  """`nn.BatchNorm` over all axes but the last, with the same variables, in fewer passes over memory.

  The moments of bfloat16 take one pass: E[(x - c)^2] - E[x - c]^2, where c is the running mean, so that
  little cancels. In float32 that costs digits, so the variance takes a second pass there, E[(x - E[x])^2].

  Attributes:
    use_running_average: Whether to normalize by the running statistics, and leave them unchanged.
    axis_name: The mapped axis over which moments are taken as well; None for none.
    momentum: The share of the running statistics that a step keeps.
    epsilon: The variance's addend.
    dtype: The result's type; moments and the arithmetic are at least float32.
    affine: Whether to have a scale and a bias.
  """

  use_running_average: bool
  axis_name: str | None
  momentum: float
  epsilon: float
  dtype: Any
  affine: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, pool: Pool | None = None, rectified: bool = False
  ) -> tuple[jax.Array, ...]:
    """Returns x [..., C], normalized, and the max pool of that, if one is given.

    Normalization is monotone in each channel, so the greatest values (the least, where the scale is negative)
    are pooled first, and only they are normalized: to the same values, rounding included. A compiler leaves
    out what is not used of the two results.

    Args:
      x: The input, of which the last axis are the channels.
      pool: The max pooling that follows.
      rectified: Whether relu(x) is meant, which is then stored no second time.
    """
    shape = (x.shape[-1],)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
    var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
    scale = self.param('scale', nn.initializers.ones, shape, jnp.float32) if self.affine else None
    bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32) if self.affine else None
    # Where the scale is negative, all is done with -x, so that the factor never is.
    sign = jnp.ones(()) if scale is None or pool is None else jnp.where(scale < 0, -1.0, 1.0)
    sign = jax.lax.stop_gradient(jnp.broadcast_to(sign, shape))
    x = _rectified(x, _like(sign.astype(x.dtype), x)) if rectified else x * _like(sign.astype(x.dtype), x)
    if self.use_running_average:
      center, variance = mean.value * sign, var.value
    else:
      center, variance = self._moments(x, mean.value * sign)
      if not self.is_initializing():
        mean.value = self.momentum * mean.value + (1 - self.momentum) * center * sign
        var.value = self.momentum * var.value + (1 - self.momentum) * variance
    factor = jax.lax.rsqrt(variance + self.epsilon) * (1.0 if scale is None else scale * sign)

    def normalized(x: jax.Array) -> jax.Array:
      y = (at_least_float32(x) - _like(center, x)) * _like(factor, x)
      return (y if bias is None else y + _like(bias, x)).astype(self.dtype)

    return (normalized(x),) if pool is None else (normalized(x), normalized(max_pool(x, pool)))

  def _moments(self, x: jax.Array, running_mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    def mean_of(x: jax.Array) -> jax.Array:
      own = jnp.mean(x, range(x.ndim - 1))
      return own if self.axis_name is None else jax.lax.pmean(own, self.axis_name)

    is_short = jnp.finfo(x.dtype).bits < 32
    x = at_least_float32(x)
    if not is_short:
      center = mean_of(x)
      return center, mean_of(jnp.square(x - _like(center, x)))
    shifted = x - _like(jax.lax.stop_gradient(running_mean), x)
    offset = mean_of(shifted)
    return running_mean + offset, jnp.maximum(mean_of(jnp.square(shifted)) - jnp.square(offset), 0.0)


@jax.custom_jvp
def _rectified(x: jax.Array, sign: jax.Array) -> jax.Array:
  """Returns relu(x) * sign; its derivative needs that alone."""
  return jnp.maximum(x, 0) * sign


@_rectified.defjvp
def _rectified_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  result = _rectified(*primals)
  return result, jnp.where(result != 0, tangents[0] * primals[1], jnp.zeros_like(result))


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
  """Returns a vector of channels with x's number of axes, as strict rank promotion asks for."""
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
