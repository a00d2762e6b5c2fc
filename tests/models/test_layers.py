"""Pooling and the local response norms against NumPy loops and flax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alexnet_flax.errors import UsageError
from alexnet_flax.models import layers
from alexnet_flax.models.spec import Conv, LocalResponseNorm, Pool, SpatialResponseNorm, window_padding
from tests.helpers import value_and_pullback

# Compiled, which costs less than one operation after the other.
pool = jax.jit(layers.pool, static_argnums=1)
local_response_norm = jax.jit(layers.local_response_norm, static_argnums=1)
spatial_response_norm = jax.jit(layers.spatial_response_norm, static_argnums=1)


@pytest.fixture
def x() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(2, 7, 8, 12)).astype(np.float32)


POOLS = [
  Pool(),
  Pool(padding='SAME'),
  Pool(ceil_mode=True),
  Pool(2, 2, padding=1),
  Pool(3, 2, padding=1, ceil_mode=True),
  Pool(3, 1, padding=1),
  Pool(3, 3),
]


@pytest.mark.parametrize('kind', ['max', 'avg', 'max+avg'])
@pytest.mark.parametrize('layer', POOLS)
def test_pool_equals_a_loop_over_windows(x, layer, kind):
  layer = Pool(layer.kernel_size, layer.strides, layer.padding, layer.ceil_mode, kind)
  result = np.asarray(pool(x, layer))
  starts = []
  for side in x.shape[1:3]:
    low, high = window_padding(layer, side)
    starts.append(range(-low, side + high - layer.kernel_size + 1, layer.strides))
  assert result.shape == (2, len(starts[0]), len(starts[1]), 12)
  by_kind = {'max': np.max, 'avg': np.mean, 'max+avg': lambda *args: (np.max(*args) + np.mean(*args)) / 2}
  reduce = by_kind[kind]
  for row, top in enumerate(starts[0]):
    for column, left in enumerate(starts[1]):
      window = x[:, max(top, 0) : top + layer.kernel_size, max(left, 0) : left + layer.kernel_size]
      np.testing.assert_allclose(result[:, row, column], reduce(window, (1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('layer', POOLS)
def test_max_pool_and_its_gradient_equal_linen(x, layer):
  def linen(x):
    padding = [window_padding(layer, side) for side in x.shape[1:3]]
    size, strides = (layer.kernel_size,) * 2, (layer.strides,) * 2
    return nn.max_pool(x, size, strides, padding)

  shape = jax.eval_shape(linen, x).shape
  cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
  ours, (gradient,) = value_and_pullback(lambda x: layers.pool(x, layer), cotangent, x)
  theirs, (linens,) = value_and_pullback(linen, cotangent, x)
  np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_allclose(gradient, linens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('layer', 'size'), [*((layer, 0) for layer in POOLS), (None, 3), (None, 4)])
def test_gpus_and_tpus_sum_the_same_windows(x, layer, size, monkeypatch):
  """By another operation than CPUs, for average pools and the spatial norm."""

  def total(x):
    if layer is None:
      y = layers.spatial_response_norm(x, SpatialResponseNorm(size, 1.0, 0.1, 0.75))
    else:
      y = layers.pool(x, dataclasses.replace(layer, kind='avg'))
    return jnp.sin(y).sum(), y

  on_cpu = jax.jit(jax.grad(total, has_aux=True))(x)
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, default, **_: default(*args))
  elsewhere = jax.jit(jax.grad(lambda x: total(x), has_aux=True))(x)  # traced anew
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), on_cpu, elsewhere)


@pytest.mark.parametrize('kind', ['max', 'avg', 'max+avg'])
@pytest.mark.parametrize('side', [1, 2])
def test_a_window_that_is_larger_than_the_image_has_no_output(kind, side):
  assert pool(jnp.ones((2, side, side, 4)), Pool(3, 2, kind=kind)).shape == (2, 0, 0, 4)


def test_max_pool_does_not_hide_nan(x):
  x[0, 3, 3, 0] = np.nan
  assert np.isnan(pool(x, Pool())[0, 1, 1, 0])


@pytest.mark.parametrize('size', [5, 4, 3])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('k', [2.0, 1.0])
@pytest.mark.parametrize('divided', [False, True])
def test_local_response_norm_is_a_loop_over_channels(x, size, groups, divided, k):
  """The paper's formula, k + alpha * sum; and Caffe's and PyTorch's, k + alpha / n * sum."""
  layer = LocalResponseNorm(size, k=k, alpha=0.3 / size if divided else 0.3, beta=0.75, groups=groups)
  expected = np.empty_like(x)
  channels = 12 // groups
  for channel in range(12):
    first = channel // channels * channels
    low = max(channel - size // 2, first)
    high = min(channel + (size - 1) // 2, first + channels - 1)
    total = np.zeros(x.shape[:3])
    for j in range(low, high + 1):
      total += x[..., j].astype(np.float64) ** 2
    mean_or_sum = total / size if divided else total  # of the whole window, at the edges too
    expected[..., channel] = x[..., channel] / (k + 0.3 * mean_or_sum) ** 0.75
  np.testing.assert_allclose(local_response_norm(x, layer), expected, rtol=1e-5)


@pytest.mark.parametrize('divided', [False, True])
def test_spatial_response_norm_is_a_loop_over_windows(x, divided):
  layer = SpatialResponseNorm(5, k=1.0, alpha=0.2 / 25 if divided else 0.2, beta=0.75)
  expected = np.empty_like(x)
  for row in range(7):
    for column in range(8):
      window = x[:, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].astype(np.float64)
      total = (window**2).sum((1, 2)) / (25 if divided else 1)
      expected[:, row, column] = x[:, row, column] / (1 + 0.2 * total) ** 0.75
  np.testing.assert_allclose(spatial_response_norm(x, layer), expected, rtol=1e-5)


@pytest.mark.parametrize('norm', [LocalResponseNorm(), SpatialResponseNorm(5, 1.0, 4e-5, 0.75)])
def test_norms_sum_in_float32(x, norm):
  function = {LocalResponseNorm: local_response_norm, SpatialResponseNorm: spatial_response_norm}[type(norm)]
  low = jnp.asarray(100 * x, jnp.bfloat16)
  result = function(low, norm)
  assert result.dtype == jnp.bfloat16
  exact = function(low.astype(jnp.float32), norm)
  np.testing.assert_array_equal(result, exact.astype(jnp.bfloat16))


def test_a_large_kernel_by_few_rows_is_multiplied_in_parts(monkeypatch):
  monkeypatch.setattr(layers, '_LARGE', 64 * 24)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(64, 24)), jnp.float32)

  def product(x, kernel):
    return layers.kernel_product(x, kernel)

  for rows, in_parts in ((8, True), (7, False), (49, False)):
    x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32)
    assert ('scan' in str(jax.make_jaxpr(product)(x, kernel))) == in_parts
    cotangent = jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32)
    found, expected = (value_and_pullback(f, cotangent, x, kernel) for f in (product, jnp.matmul))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


LOCAL = [
  Conv(5, 3, local=True),
  Conv(4, 3, 2, 1, ceil_mode=True, local=True),
  Conv(1, 7, 1, 'VALID', local=True),
]


def local(layer: Conv, dtype=jnp.float32) -> layers.LocalConv:
  return layers.LocalConv(layer, dtype, nn.initializers.normal(1.0), nn.initializers.normal(1.0))


@pytest.mark.parametrize('layer', LOCAL)
def test_local_convolution_and_its_gradients_equal_linen(x, layer):
  size, pads = (layer.kernel_size,) * 2, [window_padding(layer, side) for side in x.shape[1:3]]
  linen = nn.ConvLocal(layer.features, size, (layer.strides,) * 2, pads)
  params = jax.jit(local(layer).init)(jax.random.key(0), x)['params']
  *places, _, _, _, features = params['kernel'].shape

  def theirs(params, x):  # its kernels are laid out as channels, rows, columns
    kernel = params['kernel'].transpose(0, 1, 4, 2, 3, 5).reshape(*places, -1, features)
    return linen.apply({'params': params | {'kernel': kernel}}, x)

  shape = jax.eval_shape(theirs, params, x).shape
  cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
  ours = value_and_pullback(lambda params, x: local(layer).apply({'params': params}, x), cotangent, params, x)
  expected = value_and_pullback(theirs, cotangent, params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)


def test_a_local_convolution_with_one_kernel_is_a_convolution(x):
  layer = Conv(5, 3, local=True)
  params = local(layer).init(jax.random.key(0), x)['params']
  kernel, bias = params['kernel'][0, 0], params['bias'][0, 0]
  everywhere = {
    'kernel': jnp.broadcast_to(kernel, params['kernel'].shape),
    'bias': jnp.broadcast_to(bias, params['bias'].shape),
  }
  ours = local(layer).apply({'params': everywhere}, x)
  shared = nn.Conv(5, (3, 3)).apply({'params': {'kernel': kernel, 'bias': bias}}, x)
  np.testing.assert_allclose(ours, shared, rtol=1e-5, atol=1e-5)
  assert local(layer, jnp.bfloat16).apply({'params': everywhere}, x).dtype == jnp.bfloat16


def test_a_local_convolution_has_no_groups():
  with pytest.raises(UsageError, match=r'Conv.groups \(=2\) must be 1 where the layer is local'):
    Conv(4, 3, groups=2, local=True)
