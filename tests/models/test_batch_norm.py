"""BatchNorm against `nn.BatchNorm`, alone and followed by relu and max pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alexnet_flax.models.batch_norm import BatchNorm
from alexnet_flax.models.layers import max_pool
from alexnet_flax.models.spec import Pool


def ours(dtype, **options):
  settings = {
    'use_running_average': False,
    'axis_name': None,
    'momentum': 0.9,
    'epsilon': 1e-3,
    'affine': True,
  }
  return BatchNorm(**settings | options, dtype=dtype)


def theirs(dtype, affine=True, **options):
  settings = {'use_running_average': False, 'momentum': 0.9, 'epsilon': 1e-3, 'use_fast_variance': False}
  return nn.BatchNorm(**settings | options, use_bias=affine, use_scale=affine, dtype=dtype)


@pytest.fixture
def x():
  return np.random.default_rng(0).normal(2.0, 3.0, size=(4, 7, 7, 6)).astype(np.float32)


def variables():
  """With negative scales, and statistics that are not at their start."""
  rng = np.random.default_rng(1)
  draw = lambda: jnp.asarray(rng.normal(size=6), jnp.float32)  # noqa: E731
  return {
    'params': {'scale': draw(), 'bias': draw()},
    'batch_stats': {'mean': draw(), 'var': jnp.abs(draw()) + 0.1},
  }


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('average', [True, False])
def test_it_equals_linen(standard_promotion, x, affine, average):
  values = variables() if affine else {'batch_stats': variables()['batch_stats']}
  results = []
  for module in (ours, theirs):
    layer = module(jnp.float32, affine=affine, use_running_average=average)
    result, updated = layer.apply(values, jnp.asarray(x), mutable=['batch_stats'])
    results.append((result[0] if isinstance(result, tuple) else result, updated))
    fresh = layer.init(jax.random.key(0), jnp.asarray(x))
    results[-1] += (fresh,)
  for one, other in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2e-2)])
@pytest.mark.parametrize('rectified', [True, False])
def test_pooled_early(standard_promotion, x, dtype, tolerance, rectified):
  """Values are those of norm, then pool, rounding included; gradients are, within rounding."""
  x, values = jnp.asarray(x, dtype), variables()

  def early(params, x):
    apply = ours(jnp.dtype(dtype)).apply
    (_, pooled), updated = apply(values | {'params': params}, x, Pool(), rectified, mutable=['batch_stats'])
    return pooled, updated

  def late(params, x):
    x = nn.relu(x) if rectified else x
    apply = ours(jnp.dtype(dtype)).apply
    (y,), updated = apply(values | {'params': params}, x, mutable=['batch_stats'])
    return max_pool(y, Pool()), updated

  pulls = []
  for function in (early, late):
    pooled, pull, updated = jax.vjp(function, values['params'], x, has_aux=True)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=pooled.shape), dtype)
    pulls.append((pooled, updated, pull(cotangent)))
  np.testing.assert_array_equal(pulls[0][0], pulls[1][0])
  for one, other in zip(*(jax.tree.leaves(pull[1:]) for pull in pulls), strict=True):
    one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize('offset', [0.0, 100.0])
def test_moments_of_bfloat16_in_one_pass(standard_promotion, x, offset):
  """Also of values far from 0, once the running mean has come near theirs."""
  x = jnp.asarray(x + offset, jnp.bfloat16)
  values = variables()
  values['batch_stats']['mean'] = jnp.full(6, offset * 0.99)
  _, updated = ours(jnp.bfloat16).apply(values, x, mutable=['batch_stats'])
  exact = np.asarray(x, np.float64)
  old = values['batch_stats']
  mean, var = 0.9 * old['mean'] + 0.1 * exact.mean((0, 1, 2)), 0.9 * old['var'] + 0.1 * exact.var((0, 1, 2))
  np.testing.assert_allclose(updated['batch_stats']['mean'], mean, rtol=1e-5)
  np.testing.assert_allclose(updated['batch_stats']['var'], var, rtol=1e-5)
