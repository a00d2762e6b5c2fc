"""`alexnet-flax convert`: what it writes, what it proves, and what it refuses."""

import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.export import parity
from alexnet_flax.weights import open_weights
from tests.helpers import random_variables, smooth_image

SMALL = {
  'batchnorm': VARIANTS['batchnorm'].scaled(1 / 16, 67),
  'caffe': VARIANTS['caffe'].scaled(1 / 16, 67),
  'torchvision': VARIANTS['torchvision'].scaled(1 / 16, 67),
}
SIZE = ['--width', '0.0625', '--image_size', '67']


def written(folder, variant, name, num_classes=5):
  variables = random_variables(SMALL[variant], num_classes)
  return str(save_weights(folder / name, SMALL[variant], variables)[0]), variables


def same(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ('variant', 'theirs'),
  [
    ('torchvision', 'a.pth'),
    ('caffe', 'a.caffemodel'),
    ('batchnorm', 'a.keras'),
    ('batchnorm', 'a.weights.h5'),
  ],
)
def test_to_another_programs_format_and_back(tmp_path, capsys, variant, theirs):
  if theirs == 'a.pth':
    pytest.importorskip('torch', reason='PyTorch is not installed')
  source, variables = written(tmp_path, variant, 'ours.safetensors')
  assert main(['convert', source, str(tmp_path / theirs)]) == 0
  assert 'read back, it is the same to the bit' in capsys.readouterr().out
  assert (
    main(['convert', str(tmp_path / theirs), str(tmp_path / 'back.safetensors'), '--variant', variant, *SIZE])
    == 0
  )
  same(load_weights(tmp_path / 'back.safetensors', SMALL[variant]), variables)
  assert open_weights(tmp_path / 'back.safetensors').spec == SMALL[variant]


def test_safetensors_in_torchvisions_names(tmp_path):
  from safetensors.numpy import load_file

  source, variables = written(tmp_path, 'torchvision', 'ours.safetensors')
  destination = tmp_path / 'theirs.safetensors'
  assert main(['convert', source, str(destination), '--names', 'torchvision']) == 0
  stored = load_file(destination)
  assert {'features.0.weight', 'classifier.6.bias'} < set(stored)
  np.testing.assert_array_equal(
    stored['features.0.weight'].transpose(2, 3, 1, 0), variables['params']['conv1']['kernel']
  )


def test_verification_against_opencv_layer_by_layer(tmp_path, capsys):
  pytest.importorskip('cv2', reason='OpenCV is not installed')
  source, _ = written(tmp_path, 'caffe', 'a.caffemodel')
  for number in range(2):
    Image.fromarray(smooth_image(90, 120, number)).save(tmp_path / f'{number}.png')
  command = ['convert', source, str(tmp_path / 'b.safetensors'), '--variant', 'caffe', *SIZE]
  images = ['--images', str(tmp_path / '0.png'), str(tmp_path / '1.png')]
  assert main([*command, '--verify', *images]) == 0
  said = capsys.readouterr().out
  assert 'OpenCV' in said
  assert '2 images' in said
  for layer in ('input', 'conv1', 'norm1', 'pool5', 'fc8'):
    assert f'\n  {layer} ' in said
  assert 'the same within 0.0001' in said


def test_verification_finds_a_difference(tmp_path, capsys):
  pytest.importorskip('cv2', reason='OpenCV is not installed')
  source, _ = written(tmp_path, 'caffe', 'a.caffemodel')
  spec, file = SMALL['caffe'], open_weights(source)
  wrong = jax.tree.map(np.copy, file.variables(spec))
  wrong['params']['conv3']['bias'] += 0.01
  _, errors = parity.compare(file, spec, wrong, [smooth_image(90, 120, 0)])
  assert errors['relu2'] < 1e-4 < errors['conv3']


def test_what_it_refuses_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written(tmp_path, 'batchnorm', 'a.keras')
  written(tmp_path, 'torchvision', 'a.safetensors')
  (tmp_path / 'torn.keras').write_bytes((tmp_path / 'a.keras').read_bytes()[:5000])
  (tmp_path / 'code.pth').write_bytes(pickle.dumps(print))
  there = set(tmp_path.iterdir())
  named = ['--variant', 'batchnorm', *SIZE]
  for arguments, message in [
    (['a.keras', 'b.safetensors'], 'batchnorm at 224x224 needs (96,)'),
    (['a.keras', 'b.safetensors', '--variant', 'torchvison'], "did you mean 'torchvision'"),
    (['a.keras', 'b.safetensors', '--variant', 'torchvision', *SIZE], 'Keras has no layer like conv1'),
    (['a.keras', 'b.xyz', *named], 'b.xyz: unknown ending; choose from .safetensors'),
    (['a.keras', 'b.caffemodel', *named], 'batchnorm'),
    (['absent.pth', 'b.safetensors', *named], 'absent.pth: no such file'),
    (['torn.keras', 'b.safetensors', *named], 'torn.keras: broken'),
    (['code.pth', 'b.safetensors', '--variant', 'torchvision'], 'pth'),
    (['a.keras', 'b.safetensors', '--verify', '--images', 'none.jpg', *named], 'none.jpg'),
    (['a.safetensors', 'b.keras', '--verify'], 'is our own file'),
    (['.', 'b.keras'], "not a run's folder"),
    (['a.keras', 'nowhere/b.safetensors', *named], 'nowhere'),
  ]:
    assert main(['convert', *arguments]) == 2, arguments
    said = capsys.readouterr().err
    assert said.startswith('error: '), said
    assert said.count('\n') == 1, said
    assert message in said, said
    assert set(tmp_path.iterdir()) == there, arguments
