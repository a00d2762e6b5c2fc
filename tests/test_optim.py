"""SGD by hand, weight decay on kernels alone, multipliers, and the schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_flax import VARIANTS, AlexNet, learning_rate_schedule, sgd
from alexnet_flax.models.spec import Multipliers
from alexnet_flax.optim import OptimizerConfig, optimizer

PARAMS = {
  'conv1': {'kernel': np.array([1.0, -2.0], np.float32), 'bias': np.array([3.0], np.float32)},
  'norm1': {'scale': np.array([4.0], np.float32), 'bias': np.array([5.0], np.float32)},
}
GRADIENTS = jax.tree.map(lambda x: 0.1 * x + 1, PARAMS)


def two_steps(tx):
  params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
  for _ in range(2):
    updates, state = tx.update(GRADIENTS, state, params)
    params = optax.apply_updates(params, updates)
  return params


def by_hand(name, key, nesterov=False, rate=0.1, decay=0.0, clip=1.0):
  weight, velocity = PARAMS[name][key], 0.0
  for _ in range(2):
    gradient = GRADIENTS[name][key] * clip + decay * weight
    velocity = 0.9 * velocity + gradient
    weight = weight - rate * (gradient + 0.9 * velocity if nesterov else velocity)
  return weight


@pytest.mark.parametrize('nesterov', [False, True])
def test_momentum_and_decay_on_kernels_alone(nesterov):
  params = two_steps(sgd(0.1, nesterov=nesterov, weight_decay=0.5))
  for name, layer in params.items():
    for key, value in layer.items():
      expected = by_hand(name, key, nesterov, decay=0.5 if key == 'kernel' else 0.0)
      np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lars'])
def test_momentum_in_bfloat16(standard_promotion, name):
  """It takes half of the bytes, and is rounded once a step; parameters are not."""
  config = OptimizerConfig(name=name, momentum_dtype='bfloat16', weight_decay=0.5)
  tx = optimizer(config, 0.1)
  kept = [leaf for leaf in jax.tree.leaves(tx.init(PARAMS)) if leaf.dtype == jnp.bfloat16]
  assert [leaf.shape for leaf in kept] == [leaf.shape for leaf in jax.tree.leaves(PARAMS)]
  exact = two_steps(optimizer(dataclasses.replace(config, momentum_dtype='float32'), 0.1))
  for one, other in zip(jax.tree.leaves(two_steps(tx)), jax.tree.leaves(exact), strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, other, atol=0.1 * 2**-8 * 4)


def test_multipliers_of_the_spec():
  spec = VARIANTS['paper']
  first = dataclasses.replace(spec.layers[0], multipliers=Multipliers(0.5, 2.0, 3.0, 0.1))
  spec = dataclasses.replace(spec, layers=(first, *spec.layers[1:]))
  params = two_steps(sgd(0.1, spec=spec, weight_decay=0.5))
  expected = by_hand('conv1', 'kernel', rate=0.05, decay=1.5)
  np.testing.assert_allclose(params['conv1']['kernel'], expected, rtol=1e-6)
  expected = by_hand('conv1', 'bias', rate=0.2, decay=0.05)
  np.testing.assert_allclose(params['conv1']['bias'], expected, rtol=1e-6)
  np.testing.assert_allclose(params['norm1']['scale'], by_hand('norm1', 'scale'), rtol=1e-6)


def test_clipping_by_global_norm():
  norm = float(optax.tree.norm(GRADIENTS))
  params = two_steps(sgd(0.1, clip_norm=norm / 4))
  for name, layer in params.items():
    for key, value in layer.items():
      np.testing.assert_allclose(value, by_hand(name, key, clip=0.25), rtol=1e-5)


def test_only_kernels_of_a_whole_network_decay():
  spec = VARIANTS['batchnorm'].scaled(1 / 16, 67)
  params = AlexNet(spec).init(jax.random.key(0), jnp.zeros((1, 67, 67, 3)), train=False)['params']
  params = jax.tree.map(jnp.ones_like, params)
  tx = sgd(1.0, spec=spec, weight_decay=0.25, momentum=0.0)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    assert set(np.unique(update).tolist()) == {-0.25 if path[-1].key == 'kernel' else 0.0}


def test_schedules():
  rates = lambda name, **options: [  # noqa: E731
    round(float(learning_rate_schedule(name, 1.0, 10, **options)(step)), 4) for step in range(11)
  ]
  assert rates('constant') == [1.0] * 11
  assert rates('constant', warmup_steps=4) == [0, 0.25, 0.5, 0.75] + [1] * 7
  assert rates('step', boundaries=[3, 6], factor=0.1) == [1] * 3 + [0.1] * 3 + [0.01] * 5
  assert rates('step', boundaries=[3, 6], warmup_steps=2) == [0, 0.5, 1] + [0.1] * 3 + [0.01] * 5
  assert rates('polynomial') == [round(1 - step / 10, 4) for step in range(11)]
  assert rates('polynomial', power=2, warmup_steps=5, end=0.5)[5:] == [1.0, 0.82, 0.68, 0.58, 0.52, 0.5]
  assert rates('cosine') == [round(0.5 + 0.5 * np.cos(np.pi * step / 10), 4) for step in range(11)]
  assert rates('cosine', warmup_steps=2, end=0.1)[-1] == 0.1


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [('cosin', {}, "unknown schedule 'cosin'"), ('cosine', {'warmup_steps': 10}, 'warm-up')],
)
def test_impossible_schedules(name, options, message):
  with pytest.raises(ValueError, match=message):
    learning_rate_schedule(name, 1.0, 10, **options)


def test_lars_is_that_of_optax():
  """With the specs' decay of kernels alone."""
  settings = OptimizerConfig(name='lars', momentum=0.8, nesterov=True, weight_decay=0.5)
  kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', PARAMS)
  theirs = optax.lars(10.0, 0.5, kernels, momentum=0.8, nesterov=True)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    two_steps(optimizer(settings, 10.0)),
    two_steps(theirs),
  )
