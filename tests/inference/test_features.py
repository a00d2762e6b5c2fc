"""Activations by layer: the function, the files, and the images that cannot be read."""

import dataclasses
import datetime
import hashlib
import json
import os
import resource

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_flax import VARIANTS, AlexNet, features, grad_cam, load_pretrained, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import UnreadableError, evaluation_view, read_image
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.feature_files import _close, write_features
from tests.helpers import encode, random_variables, smooth_image

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
LAYERS = ['relu3', 'pool5', 'fc7']


@pytest.fixture(scope='module')
def variables():
  return random_variables(SPEC, num_classes=5)


@pytest.fixture
def images():
  return [smooth_image(90 + 10 * i, 140 - 7 * i, i) for i in range(5)]


def test_rows_are_what_the_network_makes_of_each_image_alone(variables, images):
  model = AlexNet(SPEC, 5)
  found = features(model, variables, images, LAYERS, batch_size=2)
  assert {name: array.shape for name, array in found.items()} == {
    'relu3': (5, 3, 3, 24), 'pool5': (5, 1, 1, 16), 'fc7': (5, 256),
  }  # fmt: skip
  mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
  for row, image in enumerate(images):
    pixels = (evaluation_view(image, SPEC).astype(np.float32) / np.float32(255) - mean) / std
    _, taps = model.apply(variables, jnp.asarray(pixels[None]), train=False, endpoints=True)
    for name in LAYERS:
      np.testing.assert_allclose(found[name][row], taps[name][0], rtol=1e-4, atol=1e-5)


def test_preprocessed_pooled_and_half(variables):
  model = AlexNet(SPEC, 5)
  images = np.random.default_rng(0).normal(size=(3, 67, 67, 3)).astype(np.float32)
  whole = features(model, variables, images, LAYERS, preprocessed=True)
  _, taps = model.apply(variables, jnp.asarray(images), train=False, endpoints=True)
  np.testing.assert_allclose(whole['relu3'], taps['relu3'], rtol=1e-4, atol=1e-5)
  for pool, reduce in (('mean', np.mean), ('max', np.max)):
    pooled = features(model, variables, images, LAYERS, preprocessed=True, pool=pool, dtype=np.float16)
    assert pooled['relu3'].dtype == np.float16
    np.testing.assert_allclose(pooled['relu3'], reduce(whole['relu3'], (1, 2)), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(pooled['fc7'], whole['fc7'], rtol=2e-3, atol=1e-3)


def test_the_specs_own_preprocessing_is_applied():
  """Caffe's: blue first, in 0..255, less its mean."""
  spec = VARIANTS['caffe'].scaled(1 / 16, 67)
  variables = random_variables(spec)
  image = smooth_image(67, 67, 0)
  square = dataclasses.replace(
    spec, preprocessing=dataclasses.replace(spec.preprocessing, center_crop_share=1.0)
  )
  found = features(AlexNet(square), variables, [image], ['conv1'])['conv1']
  pixels = image[..., ::-1].astype(np.float32) - np.float32([104.007, 116.669, 122.679])
  _, taps = AlexNet(spec).apply(variables, jnp.asarray(pixels[None]), train=False, endpoints=True)
  np.testing.assert_allclose(found, taps['conv1'], rtol=1e-4, atol=1e-4)


def test_images_of_the_networks_size_are_taken_as_they_are(variables):
  """As `classify` and `grad_cam` take them; any other is resized and cropped."""
  model, image = AlexNet(SPEC, 5), smooth_image(67, 67, 0)
  floats = np.asarray(
    normalize({'image': jnp.asarray(image[None])}, preprocessing=SPEC.preprocessing)['image']
  )
  expected = features(model, variables, floats, ['fc7'], preprocessed=True)['fc7']
  np.testing.assert_allclose(
    features(model, variables, [image], ['fc7'])['fc7'], expected, rtol=1e-5, atol=1e-6
  )
  heat = grad_cam(model, variables, [image])
  np.testing.assert_allclose(
    heat, grad_cam(model, variables, floats, preprocessed=True), rtol=1e-4, atol=1e-5
  )
  large = smooth_image(90, 140, 0)
  view = evaluation_view(large, SPEC)[None]
  np.testing.assert_array_equal(grad_cam(model, variables, [large]), grad_cam(model, variables, view))
  with pytest.raises(ValueError, match='must have one class for each of 1 images'):
    grad_cam(model, variables, [image], np.array([1, 2]))


def test_mistakes(variables, images):
  model = AlexNet(SPEC, 5)
  with pytest.raises(UsageError, match="unknown layer 'relu9'; did you mean 'relu"):
    features(model, variables, images, ['relu9'])
  with pytest.raises(UsageError, match="unknown pooling 'sum'"):
    features(model, variables, images, ['fc7'], pool='sum')
  with pytest.raises(ValueError, match=r'must be uint8 RGB \[H, W, 3\]'):
    features(model, variables, [np.zeros((9, 9, 3))], ['fc7'])
  with pytest.raises(ValueError, match=r'must be uint8 RGB'):
    features(model, variables, [np.zeros((9, 9), np.uint8)], ['fc7'])
  with pytest.raises(ValueError, match='no images'):
    features(model, variables, [], ['fc7'])


def test_the_view_is_pillows_resize_and_the_centre():
  image = smooth_image(300, 403, 1)
  spec = VARIANTS['torchvision']
  resized = Image.fromarray(image).resize((343, 256), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(evaluation_view(image, spec), np.asarray(resized)[16:240, 60:284])


def test_odd_images_are_read_as_rgb(tmp_path):
  colours = smooth_image(20, 30, 0)
  image = Image.fromarray(colours)
  for mode, ending in [
    ('L', 'jpg'),
    ('CMYK', 'jpg'),
    ('RGBA', 'png'),
    ('P', 'gif'),
    ('1', 'png'),
    ('RGB', 'bmp'),
  ]:
    image.convert(mode).save(tmp_path / f'{mode}.{ending}')
    read = read_image(tmp_path / f'{mode}.{ending}')
    assert read.shape == (20, 30, 3)
    assert read.dtype == np.uint8
  image.save(tmp_path / 'png_named.jpg', 'PNG')
  np.testing.assert_array_equal(read_image(tmp_path / 'png_named.jpg'), colours)
  (tmp_path / 'cut.jpg').write_bytes(encode(smooth_image(200, 200, 0))[:900])
  (tmp_path / 'text.jpg').write_text('hello')
  for name in ('cut.jpg', 'text.jpg', 'absent.jpg', '.'):
    with pytest.raises(UnreadableError):
      read_image(tmp_path / name)


@pytest.fixture
def folder(tmp_path, variables, images):
  """Five images, the third of them broken, and weights."""
  for number, image in enumerate(images):
    (tmp_path / f'{number}.png').write_bytes(encode(image, 'PNG'))
  (tmp_path / '2.png').write_bytes(encode(images[2], 'PNG')[:60])
  save_weights(tmp_path / 'w.safetensors', SPEC, variables)
  return tmp_path


@pytest.mark.parametrize('out', ['f.h5', 'f.npz'])
def test_an_image_that_cannot_be_read_never_shifts_a_row(folder, variables, images, capsys, out):
  files = [str(folder / f'{number}.png') for number in (4, 2, 0, 1)]
  arguments = ['--layers', 'fc7,relu3', '--weights', str(folder / 'w.safetensors'), '--batch_size', '3']
  assert main(['features', *files, *arguments, '--out', str(folder / out)]) == 2
  errors = capsys.readouterr().err.splitlines()
  assert errors[0].startswith(f'cannot read {folder}/2.png: ')
  assert (
    errors[-1] == f'error: 1 of the images cannot be read; {folder / out} is written, and their rows are NaN'
  )
  expected = features(AlexNet(SPEC, 5), variables, [images[i] for i in (4, 0, 1)], ['fc7', 'relu3'])
  stored = np.load(folder / out) if out.endswith('npz') else h5py.File(folder / out)
  names = [name.decode() if isinstance(name, bytes) else name for name in stored['names'][:]]
  assert names == files
  for name in ('fc7', 'relu3'):
    rows = stored[name][:]
    assert rows.dtype == np.float32
    assert np.isnan(rows[1]).all()
    np.testing.assert_allclose(rows[[0, 2, 3]], expected[name], rtol=1e-4, atol=1e-5)
  stored.close()
  assert not list(folder.glob('.partial*'))


def test_names_of_torchvision_and_folders(folder, variables, images):
  (folder / '2.png').unlink()
  out = folder / 'f.h5'
  weights = str(folder / 'w.safetensors')
  command = ['features', str(folder), '--weights', weights, '--out', str(out), '--half']
  assert (
    main([*command, '--layers', 'features.7,classifier.5', '--names', 'torchvision', '--pool', 'max']) == 0
  )
  expected = features(
    AlexNet(SPEC, 5), variables, [images[i] for i in (0, 1, 3, 4)], ['relu3', 'relu7'], pool='max'
  )
  with h5py.File(out) as stored:
    assert set(stored) == {'features.7', 'classifier.5', 'names', 'sha256'}
    assert stored['features.7'].attrs['layer'] == 'relu3'
    assert stored['features.7'].dtype == np.float16
    np.testing.assert_allclose(stored['features.7'][:], expected['relu3'], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(stored['classifier.5'][:], expected['relu7'], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'--layers': 'fc9'}, "unknown layer 'fc9'; did you mean 'fc"),
    (
      {'--layers': 'features.99', '--names': 'torchvision'},
      "unknown layer 'features.99'; did you mean 'features.",
    ),
    (
      {'--layers': 'features.7'},
      "'features.7' is a name of the scheme torchvision: add --names torchvision, or",
    ),
    ({'--layers': 'relu3', '--names': 'torchvision'}, "scheme ours: add --names ours, or write 'features.7'"),
    ({'--layers': ' , '}, '--layers names no layer'),
    ({'--out': 'nowhere/f.npz'}, 'cannot write nowhere/f.npz: there is no folder nowhere'),
    ({'--out': 'tests.h5/../.h5'}, 'the ending must be'),
    ({'--out': 'f.csv'}, '--out f.csv: the ending must be .h5, .hdf5 or .npz'),
    ({'--out': '/dev/null/f.h5'}, 'cannot write /dev/null/f.h5'),
    ({'--weights': 'absent.pth'}, 'absent.pth: no such file'),
    ({'--batch_size': '0'}, '--batch_size (=0) must be at least 1'),
    ({'--batch_size': 'many'}, "invalid int value: 'many'"),
    ({'--variant': 'papr', '--weights': 'torchvision'}, "unknown variant 'papr'; did you mean 'paper'?"),
  ],
)
def test_mistakes_on_the_command_line(folder, capsys, changes, message):
  arguments = {'--layers': 'fc7', '--weights': str(folder / 'w.safetensors'), '--out': str(folder / 'f.h5')}
  flags = [part for pair in (arguments | changes).items() for part in pair]
  assert main(['features', str(folder / '0.png'), *flags]) == 2
  errors = capsys.readouterr().err
  assert message in errors
  assert len(errors.splitlines()) == 1
  assert not list(folder.glob('f.*'))


@pytest.mark.parametrize('out', ['f.h5', 'f.npz'])
def test_a_file_says_what_it_holds(folder, variables, capsys, out):
  command = [
    'features',
    str(folder / '0.png'),
    '--weights',
    str(folder / 'w.safetensors'),
    '--layers',
    ' relu3 , fc7',
  ]
  assert main([*command, '--out', str(folder / out), '--half', '--pool', 'mean']) == 0
  assert capsys.readouterr().out == f'{folder / out}: 1 images, float16: relu3 [1, 24], fc7 [1, 256]\n'
  if out == 'f.npz':
    with np.load(folder / out) as stored:
      found = json.loads(str(stored['attributes']))
    layers = found.pop('layers')
  else:
    with h5py.File(folder / out) as stored:
      found = dict(stored.attrs)
      layers = {name: dict(stored[name].attrs) for name in ('relu3', 'fc7')}
  assert layers == {name: {'layer': name, 'axes': 'image, channel'} for name in ('relu3', 'fc7')}
  assert found['source'] == 'w.safetensors'
  assert (found['variant'], found['image_size'], found['layer_names']) == ('torchvision', 67, 'ours')
  assert (found['pool'], found['dtype']) == ('mean', 'float16')
  assert json.loads(found['preprocessing'])['channel_order'] == 'RGB'
  assert 'jax ' in found['versions']
  digest = hashlib.sha256()
  for layer in sorted(variables['params']):
    for leaf in ('bias', 'kernel'):
      digest.update(f'params/{layer}/{leaf}'.encode() + b'\0' + variables['params'][layer][leaf].tobytes())
  assert found['weights_sha256'] == digest.hexdigest()
  assert datetime.datetime.fromisoformat(found['created']).tzinfo == datetime.UTC


def test_an_empty_folder(folder, capsys):
  (folder / 'empty').mkdir()
  command = ['features', str(folder / 'empty'), '--layers', 'fc7', '--weights', str(folder / 'w.safetensors')]
  assert main([*command, '--out', str(folder / 'f.h5')]) == 2
  assert 'no images in the folder' in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end(tmp_path):
  file = h5py.File(tmp_path / 'f.h5', 'w')
  stored, limits = {'fc7': file.create_dataset('fc7', (2, 8))}, resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
  try:
    with pytest.raises(OSError, match='errno = 27'):
      _close(file, stored)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_caffes_names_with_a_slash(tmp_path):
  spec = VARIANTS['batchnorm_grouped'].scaled(1 / 16, 67)
  weights = tmp_path / os.fsdecode(b'w\xff.safetensors')
  save_weights(weights, spec, random_variables(spec))
  Image.fromarray(smooth_image(70, 80, 0)).save(tmp_path / 'a.png')
  (tmp_path / 'b.png').write_bytes(b'none')
  names, network = ['conv1', 'conv1/bn'], load_pretrained(weights)
  for out in ('f.npz', 'f.h5'):
    unreadable = write_features(
      network,
      [str(tmp_path / 'a.png'), str(tmp_path / 'b.png')],
      names,
      str(tmp_path / out),
      names='caffe',
    )
    assert unreadable == [str(tmp_path / 'b.png')]
  found = np.load(tmp_path / 'f.npz')
  with h5py.File(tmp_path / 'f.h5') as stored:
    assert stored.attrs['source'] == r'w\xff.safetensors'
    for name in names:
      np.testing.assert_array_equal(found[name], stored[name.replace('/', '.')][()])
      assert np.isfinite(found[name][0]).all()
      assert np.isnan(found[name][1]).all()


def test_sixteen_bits_become_eight(tmp_path):
  ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
  Image.fromarray(ramp).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(read_image(tmp_path / 'a.png')[..., 1], ramp >> 8)
  Image.fromarray(np.float32(ramp)).save(tmp_path / 'a.tif')
  with pytest.raises(UnreadableError, match='whose range is unknown'):
    read_image(tmp_path / 'a.tif')


def test_preprocessed_images_are_floats(variables):
  with pytest.raises(ValueError, match='must be floats'):
    features(AlexNet(SPEC, 5), variables, np.zeros((1, 67, 67, 3), np.uint8), ['fc7'], preprocessed=True)
