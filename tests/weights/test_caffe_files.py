"""Caffe's files as they are found: trained further, of networks with other layers, and damaged."""

import dataclasses
import pathlib

import numpy as np
import pytest

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.weights.caffe import network
from alexnet_flax.weights.caffe.schema import V1_TYPES, net_parameter
from alexnet_flax.weights.layout import tensors_of
from tests.helpers import random_variables

SPEC = VARIANTS['caffe'].scaled(1 / 16, 67)


@pytest.fixture(scope='module')
def variables():
  return random_variables(SPEC, 5)


@pytest.fixture
def net(tmp_path, variables):
  """A network's message; it is written to `tmp_path / 'a.caffemodel'` by `loaded`."""
  save_weights(tmp_path / 'a.caffemodel', SPEC, variables)
  return net_parameter().FromString((tmp_path / 'a.caffemodel').read_bytes())


def loaded(net, tmp_path, spec=SPEC):
  (tmp_path / 'a.caffemodel').write_bytes(net.SerializeToString())
  return tensors_of(load_weights(tmp_path / 'a.caffemodel', spec))


def layer_of(net, name):
  return next(layer for layer in net.layer if layer.name == name)


@pytest.mark.parametrize('variant', ['caffe', 'batchnorm_grouped'])
def test_layers_are_paired_by_order(variant, tmp_path):
  """A network trained further has a head of another name, such as fc8_flickr."""
  spec, path = VARIANTS[variant].scaled(1 / 16, 67), tmp_path / 'a.caffemodel'
  variables = random_variables(spec, 5)
  save_weights(path, spec, variables)
  net = net_parameter().FromString(path.read_bytes())
  for layer in net.layer:
    layer.name = f'{layer.name}_flickr'
  found = loaded(net, tmp_path, spec)
  for name, tensor in tensors_of(variables).items():
    np.testing.assert_array_equal(found[name], tensor)
  # Whoever reads it with OpenCV finds the layers by the file's names.
  size = ['--variant', variant, '--width', '0.0625', '--image_size', '67']
  assert main(['convert', str(path), str(tmp_path / 'b.safetensors'), '--verify', *size]) == 0


def test_a_divisor_without_a_number_divides_by_one(tmp_path):
  spec, path = VARIANTS['batchnorm_grouped'].scaled(1 / 16, 67), tmp_path / 'a.caffemodel'
  save_weights(path, spec, variables := random_variables(spec, 5))
  net = net_parameter().FromString(path.read_bytes())
  for layer in net.layer:
    if layer.type == 'BatchNorm':
      layer.blobs[2].Clear()
      layer.blobs[2].shape.dim.append(0)
  found = loaded(net, tmp_path, spec)
  for name, tensor in tensors_of(variables).items():
    np.testing.assert_array_equal(found[name], tensor)


def test_layers_that_we_do_not_know_are_refused(net, tmp_path):
  for kind in ('PReLU', 'Eltwise', 'Power', 'Concat', 'Deconvolution'):
    changed = net_parameter().FromString(net.SerializeToString())
    changed.layer.add(name='other', type=kind)
    with pytest.raises(UsageError, match='has 21 computing layers, caffe has 20'):
      loaded(changed, tmp_path)
  for kind in ('Softmax', 'SoftmaxWithLoss', 'Accuracy', 'HDF5Data', 'EuclideanLoss', 'Silence'):
    changed = net_parameter().FromString(net.SerializeToString())
    changed.layer.add(name='other', type=kind)
    loaded(changed, tmp_path)
  assert V1_TYPES[19] == 'Sigmoid'


def test_settings_that_change_the_result_are_compared(net, tmp_path):
  for name, parameters, field, value in [
    ('conv2', 'convolution_param', 'dilation', [2]),
    ('pool1', 'pooling_param', 'round_mode', 1),
    ('norm1', 'lrn_param', 'k', 2.0),
  ]:
    changed = net_parameter().FromString(net.SerializeToString())
    target = getattr(layer_of(changed, name), parameters)
    if isinstance(value, list):
      getattr(target, field).extend(value)
    else:
      setattr(target, field, value)
    with pytest.raises(UsageError, match=f'its layer {name} is'):
      loaded(changed, tmp_path)


def test_impossible_shapes(net, tmp_path):
  blob = layer_of(net, 'fc8').blobs[1]
  for dimensions in ((-1, -5), (10**18,), (0,)):
    blob.shape.ClearField('dim')
    blob.shape.dim.extend(dimensions)
    with pytest.raises(UsageError, match=r'tensor fc8\.1 is cut short'):
      loaded(net, tmp_path)


def test_a_name_does_not_write_a_prototxt():
  spec = dataclasses.replace(SPEC, name='x\ninput: "forged"', source='y\r\nlayer {}')
  text = network.prototxt(spec, 5)
  assert text.startswith('# x input: "forged": y layer {}\n# Input')


def test_both_files_or_none(variables, tmp_path, monkeypatch):
  """The second one fails: a disk that is full, or a folder of its name."""
  (tmp_path / 'a.caffemodel').write_text('what was there')
  (tmp_path / 'a.prototxt').mkdir()
  with pytest.raises(UsageError):
    save_weights(tmp_path / 'a.caffemodel', SPEC, variables)
  (tmp_path / 'a.prototxt').rmdir()

  write = pathlib.Path.write_bytes

  def full(path, content):
    if path.suffix == '.prototxt':
      raise OSError(28, 'No space left on device')
    return write(path, content)

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(UsageError, match=r'cannot write .*: No space left on device'):
    save_weights(tmp_path / 'a.caffemodel', SPEC, variables)
  monkeypatch.undo()
  assert [path.name for path in tmp_path.iterdir()] == ['a.caffemodel']
  assert (tmp_path / 'a.caffemodel').read_text() == 'what was there'
