"""Max pooling and its derivative, alone and after relu, on this platform and lowered for others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step
from alexnet_flax.models import pooling
from alexnet_flax.models.layers import max_pool, relu
from alexnet_flax.models.spec import Pool
from tests.helpers import value_and_pullback

X = np.random.default_rng(0).normal(size=(2, 9, 8, 5)).astype(np.float32)


@pytest.mark.parametrize('layer', [Pool(), Pool(padding='SAME'), Pool(ceil_mode=True), Pool(2, 2, padding=1)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_pool_of_relu_is_relu_then_pool(layer, dtype):
  x = jnp.asarray(X, dtype)
  shape = jax.eval_shape(lambda x: max_pool(x, layer), x).shape
  cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
  fused = value_and_pullback(lambda x: max_pool(x, layer, True), cotangent, x)
  plain = value_and_pullback(lambda x: max_pool(nn.relu(x), layer), cotangent, x)
  jax.tree.map(np.testing.assert_array_equal, fused, plain)


def test_one_of_equal_values_receives_the_gradient():
  gradient = jax.jit(jax.grad(lambda x: max_pool(x, Pool()).sum()))(jnp.ones((1, 3, 3, 1)))
  np.testing.assert_array_equal(gradient[0, ..., 0], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
  gradient = jax.jit(jax.grad(lambda x: max_pool(x, Pool(), True).sum()))(jnp.zeros((1, 3, 3, 1)))
  np.testing.assert_array_equal(gradient, jnp.zeros((1, 3, 3, 1)))  # as of relu at 0


def test_a_place_of_a_large_window_is_none_of_a_small_one():
  """255 is a place of windows of 16x16, whose index is wider than a byte."""
  x = jnp.arange(400.0).reshape(1, 20, 20, 1)
  index = jnp.full((1, 2, 2, 1), 255, jnp.int32)  # row 15, column 15
  found = pooling._selected_by_blocks(index, x, Pool(kernel_size=16, strides=3))
  np.testing.assert_array_equal(found, x[:, 15:19:3, 15:19:3])


def test_derivatives_of_each_example():
  """By vmap of the gradient, as those who need the gradient of each example write it."""
  gradient = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(max_pool(x[None], Pool(), True) ** 2))))(X)
  whole = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x, Pool(), True) ** 2)))(X)
  np.testing.assert_allclose(gradient, whole, rtol=1e-6)


def test_relu_equals_that_of_jax():
  values = jnp.array([-1.0, -0.0, 0.0, 2.0, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(relu(values), nn.relu(values))
  ours, theirs = (jax.vmap(jax.grad(function))(values[:5]) for function in (relu, nn.relu))
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('name', VARIANTS)
def test_no_step_has_a_select_and_scatter(name):
  """Slow on CPUs; refused by GPUs where results must repeat (google/flax#4233); TPUs are built for it."""
  spec = VARIANTS[name].scaled(1 / 16, 67)
  create = functools.partial(
    create_train_state, AlexNet(spec, 10, jnp.bfloat16), sgd(0.1), image_shape=(67, 67, 3)
  )
  state = jax.eval_shape(create, jax.random.key(0))
  batch = {
    'image': jax.ShapeDtypeStruct((2, 67, 67, 3), jnp.float32),
    'label': jax.ShapeDtypeStruct((2,), jnp.int32),
  }
  traced = jax.jit(train_step).trace(state, batch, jax.eval_shape(jax.random.key, 0))
  has = {
    platform: 'select_and_scatter' in traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cpu', 'cuda', 'tpu')
  }
  assert has == {'cpu': False, 'cuda': False, 'tpu': True}
