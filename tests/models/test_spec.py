"""Specs: layer names, scaling, replacing layers, window geometry, initialisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alexnet_flax import VARIANTS, AlexNet
from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import (
  Activation,
  BatchNorm,
  Conv,
  Dense,
  Dropout,
  Flatten,
  LocalResponseNorm,
  Pool,
  Preprocessing,
  Spec,
  UniformFanIn,
  VarianceScaling,
  window_padding,
)
from tests.helpers import random_variables


def outputs(layer, size):
  return (size + sum(window_padding(layer, size)) - layer.kernel_size) // layer.strides + 1


def test_names_of_layers():
  layers = (BatchNorm(), Conv(4, 3), LocalResponseNorm(), BatchNorm(), Flatten(), Dropout(), Dense(None))
  spec = Spec('small', layers, 8, 'made up')
  names = [name for name, _ in spec.named_layers()]
  assert names == ['norm0', 'conv1', 'norm1a', 'norm1b', 'flatten', 'drop1', 'fc2']


def test_names_are_unique():
  for spec in VARIANTS.values():
    names = [name for name, _ in spec.named_layers()]
    assert len(set(names)) == len(names)


# By hand, from the rules of Caffe (ceil), cuda-convnet and XLA.
@pytest.mark.parametrize(
  ('layer', 'size', 'expected'),
  [
    (Pool(), 56, 27),
    (Pool(), 55, 27),
    (Pool(padding='SAME'), 57, 29),
    (Pool(ceil_mode=True), 32, 16),  # cuda-convnet's cifar layers: 32, 16, 8, 4
    (Pool(ceil_mode=True), 16, 8),
    (Pool(ceil_mode=True), 54, 27),  # imgclsmob: 54, 27, 13, 6
    (Pool(ceil_mode=True), 27, 13),
    (Pool(padding=1), 55, 28),
    (Pool(padding=1, ceil_mode=True), 54, 28),
    (Pool(2, 2, padding=1, ceil_mode=True), 3, 2),  # a third window would begin in the trailing padding
    (Conv(1, 11, 4, padding=0), 227, 55),
    (Conv(1, 11, 4, padding=2), 224, 55),
    (Conv(1, 11, 4, padding=0, ceil_mode=True), 224, 55),  # the 2012 program
    (Conv(1, 11, 4, padding=0), 224, 54),
    (Conv(1, 11, 4), 224, 56),
  ],
)
def test_output_sizes(layer, size, expected):
  assert outputs(layer, size) == expected


@pytest.mark.parametrize('size', [7, 8, 57, 224])
@pytest.mark.parametrize('strides', [1, 2, 4])
def test_same_padding_equals_xla(size, strides):
  layer = Conv(1, 5, strides)
  xla = jax.lax.padtype_to_pads((size,), (5,), (strides,), 'SAME')
  assert [window_padding(layer, size)] == [tuple(pad) for pad in xla]


@pytest.mark.parametrize('width', [1 / 16, 0.25, 0.3, 2.0])
@pytest.mark.parametrize('name', VARIANTS)
def test_scaling(name, width):
  spec = VARIANTS[name]
  scaled = spec.scaled(width)
  for before, after in zip(spec.layers, scaled.layers, strict=True):
    if isinstance(before, Conv):
      assert abs(after.features - before.features * width) <= 1
      assert after.features % before.groups == 0
  assert scaled.layers[-1] == spec.layers[-1]
  assert scaled.side_lengths(224) == spec.side_lengths(224)


@pytest.mark.parametrize('width', [0, -1, float('nan'), float('inf')])
def test_invalid_width(width):
  with pytest.raises(ValueError, match=r'width \(=.*must be positive'):
    VARIANTS['paper'].scaled(width)


def test_replacing_activation_and_pooling():
  spec = VARIANTS['paper'].scaled(1 / 16, 67)
  images = jax.random.normal(jax.random.key(0), (2, 67, 67, 3))
  variables = random_variables(spec, 10)
  functions = {'tanh': jnp.tanh, 'sigmoid': nn.sigmoid, 'leaky_relu': nn.leaky_relu, 'elu': jax.nn.elu}
  for kind, function in functions.items():
    model = AlexNet(spec.replace(Activation, kind=kind).replace(Pool, kind='avg'), 10)
    _, taps = jax.jit(functools.partial(model.apply, train=False, endpoints=True))(variables, images)
    np.testing.assert_allclose(taps[f'{kind}1'], function(taps['conv1']), rtol=1e-6)
    window = np.asarray(taps['norm1'])[:, 2:5, 4:7]
    np.testing.assert_allclose(taps['pool1'][:, 1, 2], window.mean((1, 2)), rtol=1e-5)


LAYERS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
ONES = ('conv2', 'conv4', 'conv5', 'fc6', 'fc7')
CONV345 = dict.fromkeys(('conv3', 'conv4', 'conv5'), 0.03)
# Standard deviations of the kernels, and the biases that are not 0, from each program's own files.
GAUSSIANS = {
  'paper': (dict.fromkeys(LAYERS, 0.01), dict.fromkeys(ONES, 1.0)),
  'original_code': (dict.fromkeys(LAYERS, 0.01) | CONV345, dict.fromkeys(ONES, 1.0)),
  'caffe': (dict.fromkeys(LAYERS, 0.01) | {'fc6': 0.005, 'fc7': 0.005}, dict.fromkeys(ONES, 0.1)),
  'caffenet': (dict.fromkeys(LAYERS, 0.01) | {'fc6': 0.005, 'fc7': 0.005}, dict.fromkeys(ONES, 1.0)),
  'one_weird_trick': (dict.fromkeys(LAYERS, 0.01) | CONV345, dict.fromkeys(ONES, 1.0) | {'fc8': -7.0}),
  'cifar10_full': ({'conv1': 1e-4, 'conv2': 0.01, 'conv3': 0.01, 'fc4': 0.01}, {}),
  'cifar10_80sec': ({'conv1': 1e-4, 'conv2': 0.01, 'conv3': 0.01, 'fc4': 0.1, 'fc5': 0.1}, {}),
  **dict.fromkeys(
    ('cifar10_local', 'cifar10_local_lrn'),
    ({'conv1': 1e-4, 'conv2': 0.01, 'conv3': 0.04, 'conv4': 0.04, 'fc5': 0.01}, {}),
  ),
  'cifar10_four_convs': (dict.fromkeys(('conv1', 'conv2', 'conv3', 'conv4', 'fc5'), 0.01), {}),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_initialisation(name):
  spec = VARIANTS[name].scaled(0.25)
  images = (
    jnp.zeros((1, spec.image_size, spec.image_size, 3))
    if name.startswith('cifar10')
    else jnp.zeros((1, 67, 67, 3))
  )
  init = jax.jit(functools.partial(AlexNet(spec).init, train=False))
  params = init(jax.random.key(0), images)['params']
  for layer_name, layer in spec.named_layers():
    if not isinstance(layer, Conv | Dense):
      continue
    kernel, bias = (np.asarray(params[layer_name][key]) for key in ('kernel', 'bias'))
    fan_in = kernel[..., 0].size
    if name in GAUSSIANS:
      deviations, biases = GAUSSIANS[name]
      assert kernel.std() == pytest.approx(deviations[layer_name], rel=0.1)
      np.testing.assert_array_equal(bias, np.float32(biases.get(layer_name, 0.0)))
    elif name == 'batchnorm_grouped':
      assert kernel.std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
      assert not bias.any()
    elif isinstance(layer.bias_init, UniformFanIn):
      for values in (kernel, bias):
        assert np.abs(values).max() <= fan_in**-0.5
        assert np.abs(values).max() > 0.8 * fan_in**-0.5
    else:
      fan_out = kernel.shape[-1] * (fan_in // kernel.shape[-2])
      assert np.abs(kernel).max() == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.05)
      assert not bias.any()


@pytest.mark.parametrize(
  ('images', 'error', 'message'),
  [
    (jnp.zeros((67, 67, 3)), ValueError, r'shape \[B, H, W, 3\]'),
    (jnp.zeros((1, 3, 67, 67)), ValueError, r'shape \[B, H, W, 3\]'),
    (jnp.zeros((1, 67, 67, 3), jnp.uint8), TypeError, 'preprocessing'),
    (jnp.zeros((1, 60, 67, 3)), ValueError, 'an image of 60x67 is too small for the network paper'),
  ],
)
def test_invalid_images(images, error, message):
  with pytest.raises(error, match=message):
    AlexNet(VARIANTS['paper'].scaled(1 / 16)).init(jax.random.key(0), images, train=False)


def test_specs_are_values():
  assert VARIANTS['paper'].scaled(1.0) == VARIANTS['paper']
  assert len({hash(spec) for spec in VARIANTS.values()}) == len(VARIANTS)
  with pytest.raises(dataclasses.FrozenInstanceError):
    VARIANTS['paper'].name = 'mine'


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Activation('gelu'), "unknown Activation.kind 'gelu'; did you mean 'elu'"),
    (lambda: Pool(padding='VALDI'), "unknown Pool.padding 'VALDI'; did you mean 'VALID'"),
    (lambda: Pool(padding='same'), "unknown Pool.padding 'same'; did you mean 'SAME'"),
    (lambda: Pool(kind='mean'), "unknown Pool.kind 'mean'"),
    (lambda: Pool(kind='avg+max'), r"unknown Pool.kind 'avg\+max'.*choices: max, avg, max\+avg"),
    (lambda: Pool(2, padding=2), r'Pool.padding \(=2\) must be less than kernel_size \(=2\)'),
    (lambda: Conv(1, 1, padding='SAM'), "unknown Conv.padding 'SAM'; did you mean 'SAME'"),
    (lambda: VarianceScaling(1.0, 'fan_on', 'normal'), "unknown VarianceScaling.mode 'fan_on'"),
    (lambda: Preprocessing(channel_order='GBR'), "unknown Preprocessing.channel_order 'GBR'"),
    (lambda: VARIANTS['paper'].replace(Activation, kind='gelu'), "unknown Activation.kind 'gelu'"),
    (
      lambda: VARIANTS['paper'].replace(BatchNorm, momentum=0.9),
      'paper has no layer BatchNorm to replace',
    ),
    (lambda: VARIANTS['torchvison'], "unknown variant 'torchvison'; did you mean 'torchvision'"),
  ],
)
def test_names_that_are_unknown(make, message):
  with pytest.raises(UsageError, match=message):
    make()


def test_networks_that_are_not_specs():
  with pytest.raises(TypeError, match=r"must be a Spec: AlexNet\(VARIANTS\['torchvision'\]\)"):
    AlexNet('torchvision')
  with pytest.raises(UsageError, match="unknown variant 'alexnet'"):
    AlexNet('alexnet')
  with pytest.raises(TypeError, match=r"use load_pretrained\('caffe'\)"):
    AlexNet.from_pretrained('caffe')


def test_layers_that_are_not_there():
  spec = Spec('small', (Conv(4, 3), BatchNorm(), Flatten(), Dense(None)), 8, 'made up')
  images, zero = jnp.zeros((1, 8, 8, 3)), jnp.zeros(())
  with pytest.raises(UsageError, match="unknown layer to perturb 'conv2'; did you mean 'conv1'"):
    jax.eval_shape(
      lambda: AlexNet(spec).init(jax.random.key(0), images, train=False, perturbations={'conv2': zero})
    )
  with pytest.raises(UsageError, match="unknown BatchNorm to fix 'conv1'"):
    AlexNet(spec, fixed_norms=('conv1',)).init(jax.random.key(0), images, train=False)


def test_the_variants_are_shown_as_a_table():
  lines = repr(VARIANTS).splitlines()
  assert len(lines) == 1 + len(VARIANTS)
  assert lines[1].split() == ['batchnorm', '224', '96', '256', '384', '384', '256', 'BatchNorm']
  assert max(map(len, lines)) < 90
