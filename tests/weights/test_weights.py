"""Weights in and out, and every way in which a file can be wrong."""

import dataclasses
import io
import json
import pickle
import zipfile

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from alexnet_flax import VARIANTS, AlexNet, load_weights, save_weights, weights
from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Activation, Conv, Dense, Flatten, Preprocessing, Spec
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.weights import keras, native, open_weights, torchvision
from alexnet_flax.weights.caffe import network
from alexnet_flax.weights.caffe.schema import net_parameter
from alexnet_flax.weights.format import Format, Parsed
from alexnet_flax.weights.layout import (
  check,
  from_channels_first,
  in_order,
  match_input,
  tensors_of,
  to_channels_first,
  variables_of,
)
from tests.helpers import random_variables

FORMATS = [
  ('torchvision', '.safetensors', None),
  ('torchvision', '.safetensors', 'torchvision'),
  ('torchvision', '.pth', None),
  ('caffe', '.caffemodel', None),
  ('caffenet', '.caffemodel', None),
  ('batchnorm_grouped', '.caffemodel', None),
  ('cifar10_full', '.caffemodel', None),
  ('batchnorm', '.weights.h5', None),
  ('batchnorm', '.keras', None),
  ('original_code', '.safetensors', None),
  ('batchnorm_prose', '.safetensors', None),
]


def tiny(name):
  return VARIANTS[name].scaled(1 / 16)


@pytest.mark.parametrize(('name', 'ending', 'names'), FORMATS)
def test_out_and_in_again(name, ending, names, tmp_path):
  spec, path = tiny(name), tmp_path / f'network{ending}'
  variables = random_variables(spec, num_classes=7)
  written = save_weights(path, spec, variables, names=names)
  assert written == [path] if ending != '.caffemodel' else [path, path.with_suffix('.prototxt')]
  again = load_weights(path, spec)
  assert tensors_of(again).keys() == tensors_of(variables).keys()
  for key, tensor in tensors_of(variables).items():
    np.testing.assert_array_equal(tensors_of(again)[key], tensor)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)


def test_channels_first_by_a_loop():
  """fc6 sees channel c at row y, column x: input (c, y, x) of a kernel [O, C*H*W], (y, x, c) of ours."""
  spec = tiny('torchvision')
  ours = random_variables(spec)['params']['fc6']['kernel']  # [6 * 6 * 16, 256]
  theirs = to_channels_first('params/fc6/kernel', ours, spec)
  assert theirs.shape == (256, 16 * 6 * 6)
  for channel, row, column, output in [(0, 0, 0, 0), (3, 5, 1, 200), (15, 2, 4, 255), (1, 0, 5, 9)]:
    stored = theirs[output, channel * 36 + row * 6 + column]
    assert stored == ours[row * 96 + column * 16 + channel, output]
  np.testing.assert_array_equal(from_channels_first('params/fc6/kernel', theirs, spec), ours)
  kernel = random_variables(spec)['params']['conv2']['kernel']
  first = to_channels_first('params/conv2/kernel', kernel, spec)
  assert first[7, 2, 1, 4] == kernel[1, 4, 2, 7]
  np.testing.assert_array_equal(
    to_channels_first('params/fc7/kernel', spec_kernel := np.ones((3, 2), np.float32), spec), spec_kernel.T
  )


def test_torchvisions_names_are_its_own():
  names = torchvision.tensor_names(VARIANTS['torchvision'])
  weights = [name.removesuffix('.weight') for name in names.values() if name.endswith('.weight')]
  features = [f'features.{number}' for number in (0, 3, 6, 8, 10)]
  assert weights == [*features, 'classifier.1', 'classifier.4', 'classifier.6']
  assert torchvision.layer_names(VARIANTS['torchvision'])['pool5'] == 'features.12'
  with pytest.raises(UsageError, match='no layer like norm1 of paper'):
    torchvision.layer_names(VARIANTS['paper'])


def test_the_order_of_colours_is_met_by_turning_conv1_around(tmp_path):
  bgr = VARIANTS['caffe'].scaled(1 / 16, 67)
  rgb = dataclasses.replace(
    bgr,
    preprocessing=dataclasses.replace(
      bgr.preprocessing, mean=(122.679, 116.669, 104.007), channel_order='RGB'
    ),
  )
  variables = random_variables(bgr)
  image = np.random.default_rng(0).uniform(0, 255, (1, 67, 67, 3)).astype(np.float32)
  expected = AlexNet(bgr).apply(variables, image[..., ::-1] - np.float32(bgr.preprocessing.mean), train=False)
  for path in (tmp_path / 'a.caffemodel', tmp_path / 'a.safetensors'):
    save_weights(path, bgr, variables)
    turned = load_weights(path, rgb)
    logits = AlexNet(rgb).apply(turned, image - np.float32(rgb.preprocessing.mean), train=False)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  save_weights(tmp_path / 'b.caffemodel', rgb, turned)
  np.testing.assert_array_equal(
    load_weights(tmp_path / 'b.caffemodel', bgr)['params']['conv1']['kernel'],
    variables['params']['conv1']['kernel'],
  )


@pytest.mark.parametrize(
  'layers',
  [
    (Conv(4, 3, 2, local=True), Flatten(), Dense(None)),
    (Flatten(), Dense(None)),
  ],
)
def test_every_first_layer_takes_the_colours_in_another_order(layers):
  bgr = Spec('made up', layers, 5, 'made up', 3, dataclasses.replace(Preprocessing(), channel_order='BGR'))
  rgb = dataclasses.replace(bgr, preprocessing=in_order('RGB', bgr.preprocessing))
  variables = random_variables(bgr)
  turned = variables_of(match_input(tensors_of(variables), rgb, bgr.preprocessing, 'a file'))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32)
  expected = AlexNet(bgr).apply(variables, images[..., ::-1], train=False)
  np.testing.assert_allclose(AlexNet(rgb).apply(turned, images, train=False), expected, rtol=1e-5, atol=1e-6)


def test_the_norm_on_the_input_is_turned_around_with_conv1(tmp_path):
  bgr = tiny('batchnorm_grouped')
  rgb = dataclasses.replace(bgr, preprocessing=dataclasses.replace(bgr.preprocessing, channel_order='RGB'))
  variables = random_variables(bgr)
  save_weights(tmp_path / 'a.caffemodel', bgr, variables)
  turned = load_weights(tmp_path / 'a.caffemodel', rgb)
  np.testing.assert_array_equal(
    turned['batch_stats']['norm0']['mean'], variables['batch_stats']['norm0']['mean'][::-1]
  )
  np.testing.assert_array_equal(
    turned['params']['norm0']['scale'], variables['params']['norm0']['scale'][::-1]
  )
  np.testing.assert_array_equal(
    turned['params']['conv1']['kernel'], variables['params']['conv1']['kernel'][:, :, ::-1]
  )


@pytest.mark.parametrize(
  ('name', 'ending', 'preprocessing', 'message'),
  [
    ('torchvision', '.safetensors', Preprocessing(mean=(0.5, 0.5, 0.5)), r'mean \(0.485, 0.456, 0.406\)'),
    ('caffe', '.caffemodel', Preprocessing(), 'images are 0..255 less a mean'),
  ],
)
def test_another_mean_is_refused(name, ending, preprocessing, message, tmp_path):
  spec, path = tiny(name), tmp_path / f'a{ending}'
  save_weights(path, spec, random_variables(spec))
  other = dataclasses.replace(spec, preprocessing=preprocessing)
  with pytest.raises(UsageError, match=message):
    load_weights(path, other)


def test_a_caffe_file_says_what_it_subtracts(tmp_path):
  spec, path = tiny('caffe'), tmp_path / 'a.caffemodel'
  save_weights(path, spec, random_variables(spec))
  net = net_parameter().FromString(path.read_bytes())
  data = net.layer.add(name='train', type='Data')
  data.transform_param.mean_value.extend([104.007, 116.669, 122.679])
  path.write_bytes(net.SerializeToString())
  load_weights(path, spec)
  data.transform_param.mean_value[0] = 90
  path.write_bytes(net.SerializeToString())
  with pytest.raises(UsageError, match=r'mean \(90'):
    load_weights(path, spec)


def test_the_mean_of_places365_in_a_caffe_file(tmp_path):
  """As alexnet_places365.caffemodel has it, whose data layer names a mean image."""
  spec, path = tiny('caffenet'), tmp_path / 'alexnet_places365.caffemodel'
  save_weights(path, spec, variables := random_variables(spec, 365))
  net = net_parameter().FromString(path.read_bytes())
  net.layer[0].transform_param.ClearField('mean_value')
  net.layer[0].transform_param.mean_file = 'data/places2CNN365_mean.binaryproto'
  path.write_bytes(net.SerializeToString())
  network = load_pretrained(path)
  assert network.spec.preprocessing.mean == (104.051, 112.514, 116.676)
  assert network.spec.preprocessing.channel_order == 'BGR'
  assert (network.spec.name, network.class_names[-1]) == ('caffenet', 'zen_garden')
  np.testing.assert_array_equal(
    network.variables['params']['fc8']['kernel'], variables['params']['fc8']['kernel']
  )
  with pytest.raises(UsageError, match=r'mean \(104.051, 112.514, 116.676\), caffenet with'):
    load_weights(path, spec)


def test_our_own_file_holds_the_spec(tmp_path):
  spec = tiny('paper').replace(Activation, kind='tanh')
  save_weights(tmp_path / 'a.safetensors', spec, random_variables(spec))
  assert open_weights(tmp_path / 'a.safetensors').spec == spec
  for other, message in [
    (tiny('paper'), "than paper: its layer tanh1 is Activation.kind='tanh'., where relu1 must be Activation"),
    (tiny('caffe'), 'than caffe: its layer conv1 is Conv'),
  ]:
    with pytest.raises(UsageError, match=message):
      load_weights(tmp_path / 'a.safetensors', other)


@pytest.fixture
def torch_names(tmp_path):
  """A state dictionary of a tiny torchvision network: (arrays, a function that writes and loads them)."""
  spec = tiny('torchvision')
  arrays = torchvision.to_state_dict(tensors_of(random_variables(spec)), spec)

  def load(changed):
    save_file(changed, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
    return load_weights(tmp_path / 'a.safetensors', spec)

  return arrays, load


def test_missing_extra_misshapen_and_broken_tensors_are_named(torch_names):
  arrays, load = torch_names
  bad = arrays['classifier.1.weight'].copy()
  bad[3, 5] = np.nan
  for changes, message in [
    ({'features.3.weight': None}, 'missing tensor features.3.weight; is it of another architecture'),
    (
      {'features.3.weight': None, 'features.3.bias': None},
      'missing tensors features.3.weight, features.3.bias;',
    ),
    ({'features.4.weight': np.ones(1)}, 'unexpected tensor features.4.weight'),
    ({'features.0.bias': np.ones(5, np.float32)}, r'features.0.bias .params/conv1/bias. has shape .5,.'),
    ({'classifier.1.weight': np.ones((256, 99), np.float32)}, r'classifier.1.weight .params/fc6/kernel. has'),
    (
      {'classifier.1.weight': np.ones((), np.float32)},
      r'classifier.1.weight .* has shape \(\), in our layout',
    ),
    ({'classifier.1.weight': np.ones((256, 0), np.float32)}, r'needs \(\d+, 256\)$'),
    ({'classifier.1.weight': bad}, r'tensor classifier.1.weight .params/fc6/kernel. holds NaN'),
    ({'features.0.bias': np.ones(4, np.int32)}, 'features.0.bias .* holds int32; floats are needed'),
  ]:
    changed = {name: array for name, array in (arrays | changes).items() if array is not None}
    with pytest.raises(UsageError, match=message) as caught:
      load(changed)
    assert '\n' not in str(caught.value)


def test_half_precision_is_taken_as_it_is(torch_names):
  arrays, load = torch_names
  loaded = load({name: array.astype(np.float16) for name, array in arrays.items()})
  assert loaded['params']['fc7']['bias'].dtype == np.float32
  np.testing.assert_array_equal(loaded['params']['fc7']['bias'], np.float16(arrays['classifier.4.bias']))


@pytest.mark.parametrize(('name', 'ending', 'names'), FORMATS)
def test_a_truncated_file_is_one_line(name, ending, names, tmp_path):
  spec, path = tiny(name), tmp_path / f'a{ending}'
  save_weights(path, spec, random_variables(spec), names=names)
  content = path.read_bytes()
  for share in (0.0, 0.001, 0.5, 0.999):
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError) as caught:
      load_weights(path, spec)
    assert '\n' not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(('name', 'ending', 'names'), FORMATS[:1] + FORMATS[2:4] + FORMATS[7:9])
def test_garbage_inside_never_is_a_traceback(name, ending, names, tmp_path):
  spec, path = tiny(name), tmp_path / f'a{ending}'
  save_weights(path, spec, random_variables(spec), names=names)
  content, rng = path.read_bytes(), np.random.default_rng(0)
  messages = []
  for _ in range(20):
    start = rng.integers(0, min(4000, len(content)))
    damaged = bytearray(content)
    damaged[start : start + 40] = rng.bytes(40)
    path.write_bytes(bytes(damaged))
    try:
      load_weights(path, spec)
    except UsageError as error:
      messages.append(str(error))
  assert messages
  assert not any('\n' in message for message in messages)


def test_another_architecture_with_the_same_tensors_is_refused(tmp_path):
  """caffe and caffenet differ in nothing but the order of pooling and norm."""
  for name, other, ending in [('caffe', 'caffenet', '.caffemodel'), ('caffe', 'caffenet', '.safetensors')]:
    save_weights(tmp_path / f'a{ending}', tiny(name), random_variables(tiny(name)))
    with pytest.raises(UsageError, match=r'norm1|pool1'):
      load_weights(tmp_path / f'a{ending}', tiny(other))


def test_a_keras_network_of_other_layers_is_refused(tmp_path):
  spec, path = tiny('batchnorm'), tmp_path / 'a.keras'
  save_weights(path, spec, random_variables(spec))
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  config = json.loads(members['config.json'])
  layers = config['config']['layers']
  for change, message in [
    (lambda: layers[1]['config'].update(strides=[2, 2]), r'conv1 is Conv2D .*strides=\[2, 2\]'),
    (lambda: layers.insert(1, {'class_name': 'Rescaling', 'config': {'scale': 1 / 255}}), 'Rescaling'),
    (lambda: layers.pop(3), 'must be BatchNormalization'),
  ]:
    before = json.dumps(layers)
    change()
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in members.items():
        archive.writestr(name, json.dumps(config) if name == 'config.json' else content)
    with pytest.raises(UsageError, match=message):
      load_weights(path, spec)
    layers[:] = json.loads(before)


def test_formats_refuse_what_they_cannot_hold(tmp_path):
  for name, ending, message in [
    ('paper', '.keras', 'Keras has no layer like conv1 of paper'),
    ('caffe', '.weights.h5', 'Keras has no layer like norm1 of caffe'),
    ('original_code', '.caffemodel', 'Caffe has no layer like conv1 of original_code'),
    ('batchnorm', '.caffemodel', 'Caffe cannot pad like conv1 of batchnorm'),
    ('batchnorm', '.onnxx', 'unknown ending; choose from .safetensors'),
  ]:
    spec = tiny(name)
    with pytest.raises(UsageError, match=message):
      save_weights(tmp_path / f'a{ending}', spec, random_variables(spec))
  with pytest.raises(UsageError, match=r"'torchvision', and only for \.safetensors"):
    save_weights(tmp_path / 'a.keras', tiny('batchnorm'), {}, names='torchvision')
  with pytest.raises(UsageError, match='the variables: missing tensor'):
    save_weights(tmp_path / 'a.safetensors', tiny('batchnorm'), {'params': {}})
  assert not list(tmp_path.iterdir())


def test_pickles_and_strangers_are_refused_unread(tmp_path):
  class Code:
    def __reduce__(self):
      return (pytest.fail, ('the pickle was executed',))

  spec = tiny('torchvision')
  for name, content, message in [
    ('a.pkl', pickle.dumps(Code()), 'broken, or not written by PyTorch'),
    ('a.pth', pickle.dumps(Code()), 'broken, or not written by PyTorch'),
    ('a.npy', b'\x93NUMPY', 'not a weights file; known are'),
    ('a.txt', b'hello', 'not a weights file'),
    ('empty.safetensors', b'', 'not a weights file'),
  ]:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
      load_weights(tmp_path / name, spec)
  with pytest.raises(UsageError, match='no such file'):
    load_weights(tmp_path / 'absent.pth', spec)
  with pytest.raises(UsageError, match='a folder, not a weights file'):
    load_weights(tmp_path, spec)
  with pytest.raises(UsageError, match="did you mean 'torchvision'"):
    load_weights('torchvison', spec)


def test_a_new_format_is_one_registration(tmp_path, monkeypatch):
  npz = Format(
    name='npz',
    ending='.npz',
    recognize=lambda content, path: path.suffix == '.npz',
    parse=lambda content: Parsed(dict(np.load(io.BytesIO(content)))),
    read=lambda file, spec: check(file.stored, spec, str(file.path)),
    dump=lambda tensors, spec, class_names: (np.savez(b := io.BytesIO(), **tensors), b.getvalue())[1],
    variants=('torchvision',),
  )
  monkeypatch.setattr(weights, 'FORMATS', (npz, *weights.FORMATS))
  spec = tiny('torchvision')
  variables = random_variables(spec)
  assert save_weights(tmp_path / 'a.npz', spec, variables) == [tmp_path / 'a.npz']
  np.testing.assert_array_equal(
    load_weights(tmp_path / 'a.npz', spec)['params']['fc8']['kernel'], variables['params']['fc8']['kernel']
  )
  assert open_weights(tmp_path / 'a.npz').find_spec() == VARIANTS['torchvision']


def test_a_layer_that_a_format_lacks_is_an_error():
  with pytest.raises(UsageError, match='Keras has no layer like new1 of paper'):
    keras._keras_layer('new1', object(), VARIANTS['paper'], 10)
  with pytest.raises(UsageError, match='Caffe has no layer like new1 of paper'):
    list(network._caffe_layers('new1', 'new1', object(), 'drop7', VARIANTS['paper'], 10))


def test_h5_of_another_program(tmp_path):
  with h5py.File(tmp_path / 'a.weights.h5', 'w') as archive:
    archive['layers/dense/vars/0'] = np.ones(3)
  with pytest.raises(UsageError, match='missing tensors layers/conv2d/vars/0'):
    load_weights(tmp_path / 'a.weights.h5', tiny('batchnorm'))


def test_leaky_relu_means_the_same_in_keras(tmp_path):
  """Our slope is written out: Keras's own is another."""
  spec = tiny('batchnorm').replace(Activation, kind='leaky_relu')
  save_weights(tmp_path / 'a.keras', spec, random_variables(spec))
  with zipfile.ZipFile(io.BytesIO((tmp_path / 'a.keras').read_bytes())) as archive:
    layers = json.loads(archive.read('config.json'))['config']['layers']
  assert {layer['config']['negative_slope'] for layer in layers if layer['class_name'] == 'LeakyReLU'} == {
    0.01
  }
  load_weights(tmp_path / 'a.keras', spec)


def test_the_head_may_have_any_number_of_classes(tmp_path):
  spec = tiny('torchvision')
  save_weights(tmp_path / 'a.safetensors', spec, random_variables(spec, num_classes=3))
  head = spec.layers[-1]
  assert isinstance(head, Dense)
  assert load_weights(tmp_path / 'a.safetensors', spec)['params']['fc8']['bias'].shape == (3,)


def test_a_caffemodel_of_ours_says_its_mean(tmp_path):
  spec = tiny('caffe')
  other = dataclasses.replace(
    spec, preprocessing=dataclasses.replace(spec.preprocessing, mean=(10.0, 20.0, 30.0))
  )
  save_weights(tmp_path / 'a.caffemodel', other, random_variables(other))
  load_weights(tmp_path / 'a.caffemodel', other)
  with pytest.raises(UsageError, match='mean'):
    load_weights(tmp_path / 'a.caffemodel', spec)


def test_a_leaky_relu_is_no_relu(tmp_path):
  spec = tiny('caffe')
  save_weights(tmp_path / 'a.caffemodel', spec, random_variables(spec))
  net = net_parameter().FromString((tmp_path / 'a.caffemodel').read_bytes())
  next(layer for layer in net.layer if layer.type == 'ReLU').relu_param.negative_slope = 0.1
  (tmp_path / 'a.caffemodel').write_bytes(net.SerializeToString())
  with pytest.raises(UsageError, match='of another network than caffe'):
    load_weights(tmp_path / 'a.caffemodel', spec)


@pytest.mark.parametrize('size', [0, -63, 5, 56])
def test_images_that_are_too_small_for_the_network(tmp_path, size):
  """By the user's option, or as a Keras file has it."""
  spec = tiny('batchnorm')
  save_weights(tmp_path / 'a.weights.h5', spec, random_variables(spec))
  with pytest.raises(UsageError, match=r'a\.weights\.h5: an image of .* is too small .* at least 57x57'):
    load_pretrained(tmp_path / 'a.weights.h5', variant='batchnorm', image_size=size)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('"image_size": 224', '"image_size": 27'),
    ('"strides": 4', '"strides": 0'),
    ('"kind": "relu"', '"kind": "rflu"'),
    ('"channel_order": "RGB"', '"channel_order": "RBG"'),
    ('"mean": [', '"mean": [0.5, '),
    ('"scale": 0.00392156862745098', '"scale": "x"'),
    ('"std": [0.229', '"std": [0.0'),
    ('"center_crop_share": 0.875', '"center_crop_share": 1e-9'),
  ],
)
def test_a_damaged_description_of_the_network(tmp_path, old, new):
  spec, path = tiny('torchvision'), tmp_path / 'a.safetensors'
  tensors = tensors_of(random_variables(spec))
  text = json.dumps(native._encode(spec))
  assert old in text
  metadata = {'format': native.NAME, 'spec': text.replace(old, new)}
  save_file(tensors, path, metadata)
  with pytest.raises(UsageError, match='description of the network cannot be read'):
    open_weights(path)


@pytest.mark.parametrize('ending', ['.safetensors', '.pth', '.caffemodel', '.keras'])
def test_arrays_with_strides_are_written_as_they_are(tmp_path, ending):
  spec, path = tiny('batchnorm' if ending == '.keras' else 'caffe'), tmp_path / f'a{ending}'
  if ending == '.pth':
    spec = tiny('torchvision')
  variables = random_variables(spec)
  kernel = variables['params']['conv2']['kernel']
  turned = {**variables, 'params': {**variables['params'], 'conv2': {'kernel': np.asfortranarray(kernel)}}}
  turned['params']['conv2']['bias'] = np.repeat(variables['params']['conv2']['bias'], 2)[::2]
  save_weights(path, spec, turned)
  loaded = load_weights(path, spec)['params']['conv2']
  np.testing.assert_array_equal(loaded['kernel'], kernel)
  np.testing.assert_array_equal(loaded['bias'], variables['params']['conv2']['bias'])
