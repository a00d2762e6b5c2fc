"""Foolbox: FGSM and PGD on the same weights, from the same start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, AlexNet
from alexnet_flax.evaluation.adversarial import fgsm, logits_of, pgd
from alexnet_flax.models.spec import Activation, Conv, Dense, Dropout, Flatten, Pool
from alexnet_flax.weights.layout import tensors_of
from alexnet_flax.weights.torchvision import to_state_dict
from tests.helpers import random_variables, smooth_image

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')
nn = torch.nn
foolbox = pytest.importorskip('foolbox', reason='Foolbox is not installed')

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
STEPS = 5
IMAGES = np.stack([smooth_image(67, 67, seed) for seed in range(2)]) / 255.0  # float64 in 0 ... 1
LABELS = np.array([3, 700], np.int32)


@pytest.fixture(scope='module')
def variables():
  return random_variables(SPEC)


def modules(layers, channels):
  """torchvision's modules for layers of ours, the first of which sees so many channels."""
  for layer in layers:
    match layer:
      case Conv():
        yield nn.Conv2d(channels, layer.features, layer.kernel_size, layer.strides, layer.padding)
        channels = layer.features
      case Dense():
        yield nn.Linear(channels, layer.features or SPEC.num_classes)
        channels = layer.features
      case Pool():
        yield nn.MaxPool2d(layer.kernel_size, layer.strides)
      case Activation():
        yield nn.ReLU()
      case Dropout():
        yield nn.Dropout()


@pytest.fixture(scope='module')
def network(variables):
  """A narrow network in PyTorch, with its preprocessing before it, in float64."""
  flat = [isinstance(layer, Flatten) for layer in SPEC.layers].index(True)
  bare = nn.Sequential()
  bare.add_module('features', nn.Sequential(*modules(SPEC.layers[:flat], 3)))
  bare.add_module('flatten', nn.Flatten())
  bare.add_module('classifier', nn.Sequential(*modules(SPEC.layers[flat + 1 :], 16)))
  arrays = to_state_dict(tensors_of(variables), SPEC)
  bare.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
  mean, std = SPEC.preprocessing.mean, SPEC.preprocessing.std
  return nn.Sequential(torchvision.transforms.Normalize(mean, std), bare).double().eval()


@pytest.fixture(scope='module')
def predict(variables):
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
    return logits_of(AlexNet(SPEC, dtype=jnp.float64), params)


LINF, L2 = 8 / 255, 2.0
SIZE = {'steps': STEPS, 'random_start': False}
# name -> norm, epsilon, and Foolbox's attack with our size of steps; its FGSM is one step of PGD
ATTACKS = {
  'fgsm, linf': ('linf', LINF, lambda: foolbox.attacks.LinfFastGradientAttack()),
  'fgsm, l2': ('l2', L2, lambda: foolbox.attacks.L2FastGradientAttack()),
  'pgd, linf': (
    'linf',
    LINF,
    lambda: foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=2.5 * LINF / STEPS, **SIZE),
  ),
  'pgd, l2': (
    'l2',
    L2,
    lambda: foolbox.attacks.L2ProjectedGradientDescentAttack(abs_stepsize=2.5 * L2 / STEPS, **SIZE),
  ),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_adversarial_images(network, predict, name):
  norm, epsilon, attack = ATTACKS[name]
  pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy())
  bounded = foolbox.PyTorchModel(network, bounds=(0, 1), device='cpu')
  labels = foolbox.criteria.Misclassification(torch.tensor(LABELS, dtype=torch.long))
  wanted = attack().run(bounded, pixels, labels, epsilon=epsilon).numpy().transpose(0, 2, 3, 1)
  with jax.enable_x64(True):
    if name.startswith('fgsm'):
      found = jax.jit(lambda x: fgsm(predict, x, LABELS, epsilon, norm=norm))(IMAGES)
    else:
      found = jax.jit(lambda x: pgd(predict, x, LABELS, epsilon, norm=norm, steps=STEPS))(IMAGES)
  assert np.abs(wanted - IMAGES).max() > 0.01
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9 if norm == 'l2' else 1e-15)
