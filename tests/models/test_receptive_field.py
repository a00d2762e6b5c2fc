"""Receptive fields: by hand, and as the pixels on which each layer's output depends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, Activation, AlexNet, LocalResponseNorm, Pool, SpatialResponseNorm
from alexnet_flax.models.receptive_field import receptive_fields
from tests.helpers import random_variables


def smooth(spec):
  """The network with everything differentiable and increasing: then no derivative is 0 by chance."""
  for kind, changes in ((Activation, {'kind': 'sigmoid'}), (Pool, {'kind': 'avg'})):
    spec = spec.replace(kind, **changes)
  for kind in (LocalResponseNorm, SpatialResponseNorm):
    if any(isinstance(layer, kind) for layer in spec.layers):
      spec = spec.replace(kind, alpha=0.1)
  return spec


@pytest.mark.parametrize('name', VARIANTS)
def test_fields_are_the_support_of_the_gradient(name):
  """Of the unit at each place on the diagonal, in every layer."""
  whole = VARIANTS[name]
  size = min(whole.image_size, whole.smallest_image_size() + 21)
  spec = smooth(whole.scaled(1e-9, size))
  variables = jax.tree.map(np.abs, random_variables(spec, 2))
  fields = receptive_fields(spec)

  def units(image):
    _, taps = AlexNet(spec, 2).apply(variables, image[None], train=False, endpoints=True)
    found = {}
    for layer, x in taps.items():
      found[layer] = x.sum(-1)[0].diagonal() if x.ndim == 4 else x.sum(-1)
    return found

  image = jnp.asarray(np.random.default_rng(0).normal(size=(size, size, 3)), jnp.float32)
  gradients = jax.device_get(jax.jit(jax.jacrev(units))(image))
  for layer, field in fields.items():
    assert len(gradients[layer]) == len(field.spans)
    for number, (first, end) in enumerate(field.spans):
      expected = np.zeros((size, size), bool)
      expected[first:end, first:end] = True
      np.testing.assert_array_equal(np.abs(gradients[layer][number]).sum(-1) > 0, expected, err_msg=layer)


def test_by_hand():
  """Araujo et al. 2019 have 195, 32 and 64 pixels of padding for the last pool of a conv1 without padding."""
  field = receptive_fields(VARIANTS['ungrouped'])['pool5']
  assert (field.size, field.stride, field.offset) == (195, 32, -64)
  fields = receptive_fields(VARIANTS['torchvision'])
  assert fields['conv1'] == fields['relu1']
  assert fields['conv1'][:3] == (11, 4, -2)
  assert fields['conv1'].spans[:2] + fields['conv1'].spans[-1:] == ((0, 9), (2, 13), (214, 224))
  assert fields['fc8'] == (195 + 5 * 32, 0, -2 - 2 * 8 - 3 * 16, ((0, 224),))
  with pytest.raises(ValueError, match='nothing is left at pool5; it needs at least 63x63'):
    receptive_fields(VARIANTS['torchvision'], 40)


def test_pixels_that_no_unit_sees():
  """At 67 pixels pool1 leaves out the last of 16 rows; the one before it ends at 14 * 4 + 9."""
  fields = receptive_fields(VARIANTS['torchvision'], 67)
  assert fields['conv1'].spans[-2:] == ((54, 65), (58, 67))
  assert fields['pool1'].spans[-1][1] == fields['fc8'].spans[0][1] == 65
