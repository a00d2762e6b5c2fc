"""OpenCV's Caffe engine, running networks that our exporter wrote."""

import numpy as np
import pytest

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.export import parity
from alexnet_flax.models.spec import Activation, Flatten, Pool
from alexnet_flax.weights import open_weights
from alexnet_flax.weights.caffe.schema import V1_TYPES, net_parameter
from tests.helpers import random_variables

cv2 = pytest.importorskip('cv2', reason='OpenCV is not installed')
if not hasattr(cv2.dnn, 'readNetFromCaffe'):
  pytest.skip('this OpenCV (5 or later) does not read Caffe networks', allow_module_level=True)


@pytest.mark.parametrize('name', ['caffe', 'caffenet', 'batchnorm_grouped', 'cifar10_full'])
def test_every_endpoint(name, sized, photographs, tmp_path, agree):
  spec = sized(VARIANTS[name])
  path = tmp_path / 'network.caffemodel'
  variables = random_variables(spec)
  save_weights(path, spec, variables)
  program, errors = parity.compare(open_weights(path), spec, load_weights(path, spec), photographs)
  assert list(errors) == ['input', *(key for key, one in spec.named_layers() if not isinstance(one, Flatten))]
  agree(program, f'{name}: input and every endpoint', errors)


@pytest.mark.parametrize(
  ('name', 'pool'),
  [('caffenet', {'kind': 'max+avg'}), ('cifar10_full', {'kind': 'max+avg'}), ('caffe', {'padding': 1})],
)
def test_elu_and_other_pools(name, pool, sized, photographs, tmp_path, agree):
  spec = sized(VARIANTS[name]).replace(Activation, kind='elu').replace(Pool, **pool)
  path, variables = tmp_path / 'network.caffemodel', random_variables(spec)
  save_weights(path, spec, variables)
  program, errors = parity.compare(open_weights(path), spec, load_weights(path, spec), photographs)
  assert {'elu1', 'pool1'} < set(errors)
  agree(program, f'{name} with ELU and pools {pool}', errors)


def test_a_file_of_caffes_former_layers(photographs, tmp_path, agree):
  """bvlc_alexnet.caffemodel was published so: V1 layers, blobs of four axes, activations in place."""
  spec = VARIANTS['caffe'].scaled(1 / 8)
  new, old = tmp_path / 'new.caffemodel', tmp_path / 'old.caffemodel'
  variables = random_variables(spec)
  save_weights(new, spec, variables)
  old.write_bytes(former_layers(new.read_bytes()))
  again = load_weights(old, spec)
  np.testing.assert_array_equal(again['params']['fc6']['kernel'], variables['params']['fc6']['kernel'])
  program, errors = parity.compare(open_weights(old), spec, again, photographs)
  agree(program, 'caffe at width 1/8, a V1 file', errors)


def former_layers(content: bytes) -> bytes:
  numbers = {kind: number for number, kind in V1_TYPES.items()}
  source, target = net_parameter().FromString(content), net_parameter()(name='old')
  for layer in source.layer:
    if layer.type == 'Input':
      continue
    blob = layer.bottom[0].replace('relu', 'conv')
    added = target.layers.add(name=layer.name, type=numbers[layer.type], bottom=[blob], top=[layer.name])
    for field in ('convolution_param', 'inner_product_param', 'lrn_param', 'pooling_param', 'dropout_param'):
      if layer.HasField(field):
        getattr(added, field).CopyFrom(getattr(layer, field))
    for array in layer.blobs:
      shape = [1] * (4 - len(array.shape.dim)) + list(array.shape.dim)
      names = ('num', 'channels', 'height', 'width')
      added.blobs.add(data=array.data, **dict(zip(names, shape, strict=True)))
  return target.SerializeToString()


def test_the_two_of_caffe_are_not_taken_for_each_other(tmp_path):
  path = tmp_path / 'network.caffemodel'
  spec = VARIANTS['caffenet'].scaled(1 / 16)
  save_weights(path, spec, random_variables(spec))
  assert open_weights(path).find_spec().name == 'caffenet'
