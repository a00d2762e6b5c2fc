"""Attributions: by hand for small networks; the same for every variant, whatever is computed together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, Activation, AlexNet, Dense, Flatten, Pool, Spec
from alexnet_flax.errors import UsageError
from alexnet_flax.inference import attributions
from alexnet_flax.inference.attributions import (
  deconvnet,
  gradient,
  guided_backprop,
  integrated_gradients,
  occlusion,
  smoothgrad,
)
from alexnet_flax.models.spec import Preprocessing
from alexnet_flax.weights.layout import variable_shapes, variables_of
from tests.helpers import random_variables

BARE = Preprocessing(scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
DENSE = (Flatten(), Dense(8), Activation(), Dense(8), Activation(), Dense(None))


@pytest.fixture(scope='module')
def dense():
  """Three fully connected layers on one pixel: model, variables and inputs [4, 1, 1, 3]."""
  spec = Spec('dense', DENSE, 1, 'a test', 2, BARE)
  inputs = np.random.default_rng(1).normal(size=(4, 1, 1, 3)).astype(np.float32)
  return AlexNet(spec), random_variables(spec), inputs


def backwards(variables, x, label, rule):
  """What comes back to one input [3], if `rule(before, back)` is what a ReLU passes."""
  layers = [{name: np.float64(x) for name, x in variables['params'][f'fc{n}'].items()} for n in (1, 2, 3)]
  before = []
  for layer in layers:
    before.append(x @ layer['kernel'] + layer['bias'])
    x = np.maximum(before[-1], 0)
  back = layers[2]['kernel'][:, label]
  for layer, sums in ((layers[1], before[1]), (layers[0], before[0])):
    back = layer['kernel'] @ rule(sums, back)
  return back


RULES = {
  gradient: lambda before, back: back * (before > 0),
  deconvnet: lambda before, back: np.maximum(back, 0),
  guided_backprop: lambda before, back: np.maximum(back, 0) * (before > 0),
}


def test_what_a_relu_passes(dense):
  model, variables, inputs = dense
  classes, found = [0, 1, 1, 0], {}
  for method, rule in RULES.items():
    found[method] = method(model, variables, inputs, classes, preprocessed=True)
    for x, label, one in zip(inputs[:, 0, 0], classes, found[method][:, 0, 0], strict=True):
      np.testing.assert_allclose(one, backwards(variables, x, label, rule), rtol=1e-4, atol=1e-6)
  assert all(np.abs(found[gradient] - found[other]).max() > 0.01 for other in (deconvnet, guided_backprop))
  best = model.apply(variables, inputs, train=False).argmax(-1)
  own = gradient(model, variables, inputs, preprocessed=True)
  np.testing.assert_array_equal(own, gradient(model, variables, inputs, best, preprocessed=True))


def test_smoothgrad_is_the_mean_over_noise(dense):
  model, variables, inputs = dense
  options = {'samples': 20, 'noise': 2.0, 'seed': 3, 'preprocessed': True}
  found = smoothgrad(model, variables, inputs, [0, 1, 1, 0], **options)
  noise = np.random.default_rng(3).standard_normal((20, 1, 1, 3), np.float32)
  noisy = inputs[1] + 2 * (inputs[1].max() - inputs[1].min()) * noise
  each = [backwards(variables, x, 1, RULES[gradient]) for x in noisy[:, 0, 0]]
  np.testing.assert_allclose(found[1, 0, 0], np.mean(each, 0), rtol=1e-4, atol=1e-6)
  assert np.std(each, 0).max() > 0.01
  with pytest.raises(ValueError, match='samples'):
    smoothgrad(model, variables, inputs, samples=0, preprocessed=True)


def test_occlusion_of_a_linear_network():
  """There the logit falls by the weights times what is covered."""
  preprocessing = Preprocessing(scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
  spec = Spec('linear', (Flatten(), Dense(None)), 7, 'a test', 3, preprocessing)
  variables, (image,) = (
    random_variables(spec),
    np.random.default_rng(0).integers(0, 256, (1, 7, 7, 3), np.uint8),
  )
  found = occlusion(AlexNet(spec), variables, [image], [2], window=3, stride=2, color=(10, 127, 250))
  weights = variables['params']['fc1']['kernel'][:, 2].reshape(7, 7, 3)
  parts = (weights * (np.float64(image) - (10, 127, 250)) / 255 / np.array(preprocessing.std)).sum(-1)
  falls = [[[] for _ in range(7)] for _ in range(7)]
  for top in (0, 2, 4):
    for left in (0, 2, 4):
      for row in range(top, top + 3):
        for column in range(left, left + 3):
          falls[row][column].append(parts[top : top + 3, left : left + 3].sum())
  expected = [[np.mean(one) for one in row] for row in falls]
  np.testing.assert_allclose(found, [expected], rtol=1e-3, atol=1e-4)
  own = occlusion(AlexNet(spec), variables, [image], [2])
  np.testing.assert_array_equal(own, occlusion(AlexNet(spec), variables, [image], [2], window=2, stride=1))
  over = occlusion(AlexNet(spec), variables, [image], [2], window=5, stride=4)
  corner = (weights * (np.float64(image) - 127) / 255 / np.array(preprocessing.std)).sum(-1)[4:, 4:].sum()
  np.testing.assert_allclose(over[0, 6, 6], corner, rtol=1e-3, atol=1e-4)  # the last one reaches over
  for stride in (0, 4):
    with pytest.raises(ValueError, match='stride'):
      occlusion(AlexNet(spec), variables, [image], window=3, stride=stride)


VARIED = {
  'batchnorm': VARIANTS['batchnorm'].scaled(1 / 16, 57),
  'cifar10_80sec': VARIANTS['cifar10_80sec'].scaled(1 / 4),
}


@pytest.mark.parametrize('name', VARIED)
def test_a_relu_with_its_own_derivative_changes_nothing(name, monkeypatch):
  """Guided backpropagation takes pools and BatchNorm apart; the gradient computes them together."""
  spec = VARIED[name]
  model, variables = AlexNet(spec, 4), random_variables(spec, 4)
  images = np.random.default_rng(0).normal(size=(2, spec.image_size, spec.image_size, 3)).astype(np.float32)
  images *= 60 if spec.preprocessing.scale == 1 else 1
  monkeypatch.setattr(attributions, '_BATCH', 2)
  rule = attributions._relu_with(lambda result, back: jnp.where(result > 0, back, 0 * back))
  options = {'classes': [0, 3], 'preprocessed': True}
  whole = gradient(model, variables, images, **options)
  apart = gradient(model.clone(relu=rule), variables, images, **options)
  np.testing.assert_allclose(apart, whole, atol=1e-4 * np.abs(whole).max())
  guided = guided_backprop(model, variables, images, **options)
  assert np.abs(guided - whole).max() > 0.1 * np.abs(whole).max()
  assert np.isfinite(guided).all()


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_has_a_relu_to_change(variant):
  spec = VARIANTS[variant]
  images = jax.ShapeDtypeStruct((2, spec.image_size, spec.image_size, 3), jnp.float32)
  variables = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in variable_shapes(spec).items()
  }
  labels = jax.ShapeDtypeStruct((2,), jnp.int32)
  program = attributions._compiled(AlexNet(spec, relu=attributions._guided_relu), True)
  assert jax.eval_shape(program, variables_of(variables), images, labels).shape == images.shape


@pytest.mark.parametrize(('kind', 'steps', 'tolerance'), [('tanh', 16, 1e-4), ('relu', 64, 0.05)])
def test_integrated_gradients_are_complete(kind, steps, tolerance):
  spec = VARIED['cifar10_80sec'].replace(Activation, kind=kind)
  if kind == 'tanh':
    spec = spec.replace(Pool, kind='avg')  # smooth, so that few steps are enough
  model, variables = AlexNet(spec, 4), random_variables(spec, 4)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  found = integrated_gradients(model, variables, images, [1, 2], baseline=(9, 99, 199), steps=steps)
  pixels = np.float32([*images, np.broadcast_to(np.float32([9, 99, 199]), (32, 32, 3))])
  inputs = (pixels * spec.preprocessing.scale - np.float32(spec.preprocessing.mean)) / np.float32(
    spec.preprocessing.std
  )
  first, second, start = np.asarray(model.apply(variables, inputs, train=False))
  differences = np.array([first[1] - start[1], second[2] - start[2]])
  np.testing.assert_allclose(found.sum((1, 2, 3)), differences, atol=tolerance * np.abs(differences).max())
  if kind == 'tanh':
    with pytest.raises(UsageError, match='this network has no ReLU'):
      guided_backprop(model, variables, images)


def test_classes(dense):
  model, variables, inputs = dense
  for classes in ([0], [0, 1, 2, 0], [0, -1, 0, 0]):
    with pytest.raises(ValueError, match=r'must be 4 in 0 \.\.\. 1'):
      gradient(model, variables, inputs, classes, preprocessed=True)
  wide = dataclasses.replace(model, num_classes=5)
  assert gradient(wide, random_variables(wide.spec, 5), inputs, [4] * 4, preprocessed=True).shape == (
    4,
    1,
    1,
    3,
  )


def test_the_batch_does_not_matter(dense, monkeypatch):
  model, variables, inputs = dense
  many = np.concatenate([inputs] * 5)
  found = gradient(model, variables, many, preprocessed=True)
  monkeypatch.setattr(attributions, '_BATCH', 3)
  np.testing.assert_allclose(gradient(model, variables, many, preprocessed=True), found, rtol=1e-5)
