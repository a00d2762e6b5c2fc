"""Keras's files as they are found: of every age, of other networks, and such that lead out of the file."""

import io
import json
import os
import zipfile

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Activation, BatchNorm
from alexnet_flax.weights import keras, open_weights
from alexnet_flax.weights.layout import tensors_of
from tests.helpers import random_variables

SPEC = VARIANTS['batchnorm'].scaled(1 / 16, 67)
SIZE = ['--variant', 'batchnorm', '--width', '0.0625', '--image_size', '67']


@pytest.fixture(scope='module')
def variables():
  return random_variables(SPEC, 5)


def layers_of(variables, config):
  """The layers of a network with their variables in Keras's order: [(name, {variable: array})]."""
  leaves = {'kernel': 0, 'scale': 0, 'bias': 1, 'mean': 2, 'var': 3}
  names = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}
  tensors = tensors_of(variables)
  layers = []
  for layer in config['config']['layers'][1:]:
    name = layer['config']['name']
    found = {key.rpartition('/')[2]: array for key, array in tensors.items() if f'/{name}/' in key}
    ordered = sorted(found, key=leaves.__getitem__)
    layers.append((name, {names.get(one, one) if 'norm' in name else one: found[one] for one in ordered}))
  return layers


def write_legacy(path, layers, config=None, as_bytes=True, prefix='', ending=':0'):
  """The HDF5 files of Keras 1 and 2, with and without the network's description."""
  texts = np.bytes_ if as_bytes else str
  with h5py.File(path, 'w') as file:
    root = file
    if config is not None:
      file.attrs['model_config'] = json.dumps(config)
      root = file.create_group('model_weights')
      file['optimizer_weights/momentum:0'] = np.ones(3)
    root.attrs['layer_names'] = [texts(name) for name, _ in layers]
    for name, arrays in layers:
      group = root.create_group(name)
      stored = {f'{prefix}{name}/{leaf}{ending}': array for leaf, array in arrays.items()}
      group.attrs['weight_names'] = [texts(weight) for weight in stored]
      for weight, array in stored.items():
        group[weight] = array
  return path


def same(path, variables, spec=SPEC, rtol=0.0):
  loaded = tensors_of(load_weights(path, spec))
  for name, tensor in tensors_of(variables).items():
    np.testing.assert_allclose(loaded[name], tensor, rtol=rtol)


def test_legacy_files_with_and_without_the_network(variables, tmp_path):
  config = keras.keras_config(SPEC, 5)
  layers = layers_of(variables, config)
  plain = write_legacy(tmp_path / 'weights.h5', layers)
  same(plain, variables)
  assert open_weights(plain).layers is None
  whole = write_legacy(tmp_path / 'whole.h5', layers, config, as_bytes=False, prefix='sequential/', ending='')
  same(whole, variables)
  with pytest.raises(UsageError, match=r'its layer conv1 is Conv2D .*, where conv1 must be Conv2D'):
    load_weights(whole, VARIANTS['batchnorm'].scaled(1 / 16, 67).replace(type(SPEC.layers[0]), strides=1))
  assert main(['convert', str(whole), str(tmp_path / 'a.safetensors'), *SIZE]) == 0
  # Keras 2.0 had a list of layers, and called LeakyReLU's slope alpha.
  leaky = SPEC.replace(Activation, kind='leaky_relu')
  config = keras.keras_config(leaky, 5)
  for layer in config['config']['layers']:
    if layer['class_name'] == 'LeakyReLU':
      layer['config']['alpha'] = float(np.float32(layer['config'].pop('negative_slope')))
  config['config'] = config['config']['layers']
  same(
    write_legacy(tmp_path / 'leaky.h5', layers_of(variables, keras.keras_config(leaky, 5)), config),
    variables,
    leaky,
  )


@pytest.mark.parametrize(('layer', 'instead'), [('pool1', 'average_pooling2d'), ('relu3', 'leaky_re_lu_2')])
def test_names_of_layers_tell_the_network(variables, tmp_path, layer, instead):
  """Layers without weights, of which .weights.h5 holds nothing but the name."""
  layers = layers_of(variables, keras.keras_config(SPEC, 5))
  renamed = [(instead if name == layer else name, arrays) for name, arrays in layers]
  with pytest.raises(
    UsageError, match=f'it has 1 layers of the kind {instead.removesuffix("_2")}, where 0 must be'
  ):
    load_weights(write_legacy(tmp_path / 'a.h5', renamed), SPEC)
  path = tmp_path / 'a.weights.h5'
  save_weights(path, SPEC, variables)
  same(path, variables)
  with h5py.File(path, 'a') as file:
    assert 'max_pooling2d_2' in file['layers']
    file.create_group(f'layers/{instead}/vars')
  with pytest.raises(UsageError, match='is of another network than batchnorm: it has 1 layers of the kind'):
    load_weights(path, SPEC)


def test_preprocessing_and_missing_layers_are_seen(variables, tmp_path):
  path = tmp_path / 'a.weights.h5'
  for change in (
    lambda layers: layers.create_group('rescaling'),
    lambda layers: layers.pop('max_pooling2d_1'),
  ):
    save_weights(path, SPEC, variables)
    with h5py.File(path, 'a') as file:
      change(file['layers'])
    with pytest.raises(
      UsageError, match=r'layers of the kind (rescaling, where 0|max_pooling2d, where 3) must be'
    ):
      load_weights(path, SPEC)
  save_weights(path, SPEC, variables)
  with h5py.File(path, 'a') as file:  # as this program wrote them before, and Keras 2.15
    for name in list(file['layers']):
      if 'vars' not in file['layers'][name] or not len(file['layers'][name]['vars']):
        del file['layers'][name]
    file.move('layers', '_layer_checkpoint_dependencies')
  same(path, variables)


def rewritten(path, change):
  """Changes the description in a .keras file."""
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  config = json.loads(members['config.json'])
  change(config['config']['layers'])
  members['config.json'] = json.dumps(config)
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in members.items():
      archive.writestr(name, content)


@pytest.mark.parametrize('softmax', [('Softmax', {'axis': -1}), ('Activation', {'activation': 'softmax'})])
def test_a_softmax_at_the_end_is_left_out(variables, tmp_path, softmax):
  kind, config = softmax
  save_weights(tmp_path / 'a.keras', SPEC, variables)
  rewritten(tmp_path / 'a.keras', lambda layers: layers.append({'class_name': kind, 'config': config}))
  same(tmp_path / 'a.keras', variables)
  rewritten(tmp_path / 'a.keras', lambda layers: layers.insert(3, {'class_name': kind, 'config': config}))
  with pytest.raises(UsageError, match='is Activation activation=softmax, where norm1 must be'):
    load_weights(tmp_path / 'a.keras', SPEC)


def test_elu_as_a_layer_of_its_own(variables, tmp_path):
  elu = SPEC.replace(Activation, kind='elu')

  def change(layers):
    for layer in layers:
      if layer['class_name'] == 'Activation':
        layer |= {'class_name': 'ELU', 'config': {'alpha': alpha}}

  for alpha in (1.0, 0.5):
    save_weights(tmp_path / 'a.keras', elu, variables)
    rewritten(tmp_path / 'a.keras', change)
    if alpha == 1:
      same(tmp_path / 'a.keras', variables, elu)
  with pytest.raises(UsageError, match='its layer ELU is ELU, where elu1 must be Activation activation=elu'):
    load_weights(tmp_path / 'a.keras', elu)


def test_half_precision_of_another_kind(variables, tmp_path):
  """bfloat16 in Keras's files is two bytes without a type."""
  rounded = {name: array.astype(jnp.bfloat16) for name, array in tensors_of(variables).items()}
  save_weights(tmp_path / 'a.weights.h5', SPEC, variables)
  with h5py.File(tmp_path / 'a.weights.h5', 'a') as file:
    for ours, theirs in keras.tensor_names(SPEC).items():
      del file[theirs]
      file[theirs] = rounded[ours].view('V2')
      file[theirs].attrs['dtype'] = 'bfloat16'
  loaded = tensors_of(load_weights(tmp_path / 'a.weights.h5', SPEC))
  for name, array in rounded.items():
    np.testing.assert_array_equal(loaded[name], array.astype(np.float32))


@pytest.mark.parametrize('ending', ['.keras', '.weights.h5'])
def test_batchnorm_without_scale_and_offset(tmp_path, ending):
  spec = SPEC.replace(BatchNorm, affine=False)
  variables = random_variables(spec, 5)
  save_weights(tmp_path / f'a{ending}', spec, variables)
  same(tmp_path / f'a{ending}', variables, spec)


SECRET = b'the secret of another file, as long as some numbers are.........'


def hostile(path, kind, secret):
  """A network's file of which one bias lies elsewhere."""
  place = 'layers/conv2d/vars/1'
  with h5py.File(path, 'a') as file:
    shape = file[place].shape
    del file[place]
    match kind:
      case 'external':
        file.create_dataset(place, shape, 'f4', external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
      case 'virtual':
        layout = h5py.VirtualLayout(shape, 'f4')
        layout[:] = h5py.VirtualSource(str(secret), 'x', shape)
        file.create_virtual_dataset(place, layout)
      case 'external link':
        file[place] = h5py.ExternalLink(str(secret), 'x')
      case 'soft link':
        file[place] = h5py.SoftLink('/layers/conv2d_1/vars/1')
      case 'absurd shape':
        file.create_dataset(place, (10**12,), 'f4', chunks=(10**6,))
      case 'compressed':
        file.create_dataset(place, (4 * 10**8,), 'f4', chunks=(10**7,), compression='gzip')


@pytest.mark.parametrize(
  'kind', ['external', 'virtual', 'external link', 'soft link', 'absurd shape', 'compressed']
)
def test_nothing_outside_of_the_file_is_read(variables, tmp_path, kind):
  secret = tmp_path / 'secret'
  with h5py.File(secret, 'w') as file:
    file['x'] = np.frombuffer(SECRET, 'f4')[:6]
  path, archive = tmp_path / 'a.weights.h5', tmp_path / 'a.keras'
  save_weights(path, SPEC, variables)
  hostile(path, kind, secret)
  save_weights(archive, SPEC, variables)
  with zipfile.ZipFile(archive) as members:
    config = members.read('config.json')
  with zipfile.ZipFile(archive, 'w') as members:
    members.writestr('config.json', config)
    members.write(path, 'model.weights.h5')
  legacy = write_legacy(tmp_path / 'a.h5', layers_of(variables, keras.keras_config(SPEC, 5)))
  with h5py.File(legacy, 'a') as file:
    file.move('conv1', 'layers/conv2d')  # where `hostile` looks
    file.move('layers/conv2d/conv1/bias:0', 'layers/conv2d/vars/1')
  hostile(legacy, kind, secret)
  for source in (path, archive, legacy):
    destination = tmp_path / 'out.safetensors'
    with pytest.raises(UsageError, match='refused: '):
      load_weights(source, SPEC)
    assert main(['convert', str(source), str(destination), *SIZE]) == 2
    assert not destination.exists()


def test_members_are_bounded_before_they_are_inflated(variables, tmp_path):
  path = tmp_path / 'a.keras'
  save_weights(path, SPEC, variables)
  with zipfile.ZipFile(path) as archive:
    content = archive.read('model.weights.h5')
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('config.json', '{}')
    archive.writestr('model.weights.h5', content)
    archive.infolist()[1].file_size = 3 * 2**30
  path.write_bytes(buffer.getvalue())
  with pytest.raises(UsageError, match='claims to hold 3,221,225,'):
    load_weights(path, SPEC)


def test_a_pipe_does_not_hang(tmp_path):
  for name in ('a.keras', 'a.pth', 'a.safetensors', 'a.caffemodel', 'a.h5'):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=f'{name}: not a regular file'):
      open_weights(tmp_path / name)


@pytest.mark.parametrize(
  'text',
  [
    '[' * 100_000,
    '{}',
    '[]',
    '{"config": []}',
    '{"config": {"layers": [{"class_name": "Dense"}]}}',
    '\udcff',
  ],
)
def test_damaged_descriptions(variables, tmp_path, text):
  path = tmp_path / 'a.keras'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('config.json', text.encode(errors='surrogateescape'))
    archive.writestr('model.weights.h5', b'')
  with pytest.raises(UsageError, match='broken, or not a sequential Keras network'):
    open_weights(path)


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    ('a.keras', b'PK\x01\x02\x14\x03\x14', b'PK\x01\x02\x14\x03\x54'),  # a version of ZIP to come
    ('a.weights.h5', b'conv2d_1', b'\x80onv2d_1'),  # not UTF-8
  ],
)
def test_libraries_raise_errors_of_any_kind(variables, tmp_path, name, old, new):
  save_weights(tmp_path / name, SPEC, variables)
  content = (tmp_path / name).read_bytes()
  assert old in content
  (tmp_path / name).write_bytes(content.replace(old, new))
  with pytest.raises(UsageError, match=f'{name}: broken'):
    load_weights(tmp_path / name, SPEC)
