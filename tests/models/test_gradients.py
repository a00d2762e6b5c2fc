"""Gradients: each kind of layer against finite differences, and every parameter of every variant."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from alexnet_flax import (
  VARIANTS,
  AlexNet,
  create_train_state,
  cross_entropy,
  mean_squared_error,
  sgd,
  train_step,
)
from alexnet_flax.models.spec import (
  TORCH_UNIFORM,
  Activation,
  BatchNorm,
  Conv,
  Dense,
  Dropout,
  Flatten,
  LocalResponseNorm,
  Pool,
  SpatialResponseNorm,
  Spec,
  UniformFanIn,
)
from tests.helpers import initialize, random_variables

LAYERS = {
  'conv': Conv(4, 3, 2, padding=1),
  'conv_grouped': Conv(6, 3, groups=3),
  'conv_ceil': Conv(4, 3, 4, padding=0, ceil_mode=True),
  'conv_local': Conv(2, 3, 3, local=True, kernel_init=TORCH_UNIFORM, bias_init=UniformFanIn()),
  'relu': Activation('relu'),
  'tanh': Activation('tanh'),
  'sigmoid': Activation('sigmoid'),
  'leaky_relu': Activation('leaky_relu'),
  'elu': Activation('elu'),
  'max_pool': Pool(),
  'max_pool_ceil': Pool(padding='SAME', ceil_mode=True),
  'avg_pool': Pool(kind='avg', ceil_mode=True),
  'max_avg_pool': Pool(kind='max+avg', padding=1, ceil_mode=True),
  'local_norm': LocalResponseNorm(3, k=1.0, alpha=0.5),
  'local_norm_grouped': LocalResponseNorm(5, k=2.0, alpha=0.5, groups=3),
  'spatial_norm': SpatialResponseNorm(3, k=1.0, alpha=0.5, beta=0.75),
  'batch_norm': BatchNorm(),
  'batch_norm_plain': BatchNorm(affine=False),
  'dropout': Dropout(0.3),
}


@pytest.fixture
def x64():
  with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):  # nn.BatchNorm mixes types
    yield


@pytest.mark.parametrize('name', LAYERS)
def test_layer(x64, name):
  """With respect to parameters and input, in forward and reverse mode, in float64."""
  spec = Spec(name, (Conv(3, 1), LAYERS[name], Flatten(), Dense(None)), 8, 'made up', num_classes=3)
  model = AlexNet(spec, dtype=jnp.float64)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)))
  variables = jax.tree.map(lambda x: x.astype(jnp.float64), initialize(model, images))
  stats = {name: value for name, value in variables.items() if name != 'params'}

  @jax.jit
  def logits(params, images):
    rngs = {'dropout': jax.random.key(1)}
    out, _ = model.apply({'params': params, **stats}, images, train=True, rngs=rngs, mutable=['batch_stats'])
    return out

  check_grads(logits, (variables['params'], images), order=1, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('loss', [cross_entropy, mean_squared_error])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_loss(x64, loss, label_smoothing):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
  function = lambda logits: loss(logits, jnp.array([0, 4, 2]), label_smoothing=label_smoothing)  # noqa: E731
  check_grads(jax.jit(function), (logits,), order=2, atol=1e-6, rtol=1e-6)


def pixel_deviation(spec):
  return 0.25 * 255 * spec.preprocessing.scale / spec.preprocessing.std[0]


@pytest.mark.parametrize('name', VARIANTS)
def test_every_parameter_receives_a_gradient(name):
  spec = VARIANTS[name].scaled(1 / 16, 67)
  model = AlexNet(spec, num_classes=5)
  images = jax.random.normal(jax.random.key(1), (8, 67, 67, 3)) * pixel_deviation(spec)
  labels = jnp.arange(8) % 5
  variables = random_variables(spec, 5)

  def loss(params):
    logits, _ = model.apply(
      variables | {'params': params},
      images,
      train=True,
      rngs={'dropout': jax.random.key(2)},
      mutable=['batch_stats'],
    )
    return cross_entropy(logits, labels).mean()

  for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(variables['params'])):
    assert bool(jnp.isfinite(gradient).all()), path
    assert bool(jnp.any(gradient != 0)), path


@pytest.mark.parametrize('name', ['batchnorm_prose', 'paper', 'torchvision'])  # each has its own order
def test_dropout_depends_on_its_key_and_only_in_training(name):
  spec = VARIANTS[name].scaled(1 / 16, 67)
  model = AlexNet(spec, num_classes=5)
  images = jax.random.normal(jax.random.key(1), (4, 67, 67, 3)) * pixel_deviation(spec)
  variables = random_variables(spec, 5)

  @functools.partial(jax.jit, static_argnums=1)
  def logits(key, train):
    return model.apply(variables, images, train=train, rngs={'dropout': key}, mutable=['batch_stats'])[0]

  one, other = jax.random.key(1), jax.random.key(2)
  np.testing.assert_array_equal(logits(one, True), logits(one, True))
  assert np.abs(logits(one, True) - logits(other, True)).max() > 1e-6
  np.testing.assert_array_equal(logits(one, False), logits(other, False))


def test_dropout_keeps_the_mean_and_the_rate():
  model = AlexNet(Spec('drop', (Flatten(), Dropout(0.3), Dense(None)), 4, 'made up', num_classes=2))
  images = jnp.ones((500, 4, 4, 3))
  variables = model.init(jax.random.key(0), images, train=False)
  _, taps = model.apply(variables, images, train=True, rngs={'dropout': jax.random.key(1)}, endpoints=True)
  kept = np.asarray(taps['drop0'])
  np.testing.assert_allclose(np.unique(kept), [0.0, 1 / 0.7], rtol=1e-6)
  assert (kept == 0).mean() == pytest.approx(0.3, abs=0.02)


@functools.cache
def step_and_result():
  """A network with all kinds of layers, a batch, and the result of a jitted step."""
  norm = SpatialResponseNorm(3, k=1.0, alpha=0.5, beta=0.75)
  layers = (
    *(Conv(6, 3, 2), Activation(), LocalResponseNorm(), BatchNorm(), Pool()),
    *(Conv(6, 3, groups=2), Activation('tanh'), norm, Pool(kind='avg')),
    *(Flatten(), Dense(8), Activation(), Dense(None)),
  )
  spec = Spec('all kinds', layers, 32, 'made up', num_classes=5)
  state = create_train_state(AlexNet(spec), sgd(0.01, spec=spec), jax.random.key(0), (32, 32, 3))
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.normal(size=(4, 32, 32, 3)), jnp.float32),
    'label': jnp.asarray(rng.integers(0, 5, 4), jnp.int32),
    'weight': jnp.ones(4),
  }
  return state, batch, jax.jit(train_step)(state, batch, jax.random.key(1))


class StepVariants(chex.TestCase):
  """A step gives the same result without jit; tests/test_steps.py has pmap."""

  @chex.variants(without_jit=True)
  def test_step(self):
    state, batch, (expected, expected_metrics) = step_and_result()
    arrays = {'params': state.params, 'batch_stats': state.batch_stats}

    @self.variant
    def step(arrays, batch):
      new, metrics = train_step(state.replace(**arrays), batch, jax.random.key(1))
      return new.params, new.batch_stats, metrics['loss']

    params, batch_stats, loss = jax.tree.map(np.asarray, step(arrays, batch))
    chex.assert_trees_all_close(params, expected.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(batch_stats, expected.batch_stats, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, expected_metrics['loss'], rtol=1e-5)
