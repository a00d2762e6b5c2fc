"""`alexnet-flax convert`: what it writes, what it proves, and what it refuses."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.export import parity
from alexnet_flax.export.convert import TOLERANCE
from alexnet_flax.inference.features import features
from alexnet_flax.models.spec import Activation, BatchNorm, Conv, LocalResponseNorm, Pool
from alexnet_flax.pretrained import PretrainedModel, load_pretrained
from alexnet_flax.weights import caffe, open_weights
from alexnet_flax.weights.layout import from_channels_first
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


def scaled_kernel(name, array, spec):
  return from_channels_first(name, array, spec) * np.float32(1.001 if name == 'params/conv3/kernel' else 1)


def turned_kernel(name, array, spec):
  """conv2 with rows for columns."""
  ours = from_channels_first(name, array, spec)
  return ours.swapaxes(0, 1) if name == 'params/conv2/kernel' else ours


def not_a_number(*arguments, **options):
  taps = features(*arguments, **options)
  return taps | {'relu6': taps['relu6'] * np.nan}


@pytest.mark.parametrize(
  ('where', 'what', 'sabotage', 'found'),
  [
    (caffe, 'from_channels_first', scaled_kernel, 'conv3'),
    (caffe, 'from_channels_first', turned_kernel, 'conv2'),
    (caffe, 'match_input', lambda tensors, *_: tensors | {'params/fc8/bias': np.zeros(5, np.float32)}, 'fc8'),
    (parity, 'normalize', lambda batch, **_: {'image': batch['image'] - jax.numpy.float32(110)}, 'input'),
    (parity, 'features', not_a_number, 'relu6'),
  ],
)
def test_verification_finds_sabotage(tmp_path, capsys, monkeypatch, where, what, sabotage, found):
  """Whatever is broken on our side: a kernel, an order, a bias, the preprocessing, a layer."""
  source, _ = written(tmp_path, 'caffe', 'a.caffemodel')
  Image.fromarray(smooth_image(90, 120, 0)).save(tmp_path / '0.png')
  monkeypatch.setattr(where, what, sabotage)
  command = ['convert', source, str(tmp_path / 'b.safetensors'), '--variant', 'caffe', *SIZE]
  with jax.numpy_dtype_promotion('standard'):
    assert main([*command, '--images', str(tmp_path / '0.png')]) == 1
  said = capsys.readouterr().out
  assert 'NOT the same within 0.0001' in said
  errors = dict(line.split() for line in said.splitlines() if line.startswith('  '))
  first = next(layer for layer, error in errors.items() if not float(error) <= TOLERANCE)
  assert first == found


def test_what_it_refuses_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written(tmp_path, 'batchnorm', 'a.keras')
  written(tmp_path, 'batchnorm', 'a.weights.h5')
  written(tmp_path, 'torchvision', 'a.safetensors')
  (tmp_path / 'torn.keras').write_bytes((tmp_path / 'a.keras').read_bytes()[:5000])
  (tmp_path / 'code.pth').write_bytes(pickle.dumps(print))
  there = set(tmp_path.iterdir())
  named = ['--variant', 'batchnorm', *SIZE]
  for arguments, message in [
    (['a.weights.h5', 'b.safetensors'], 'needs (576, 256); images of 57 to 88 pixels fit it (image_size)'),
    (['a.keras', 'b.safetensors', '--width', '0.5'], 'batchnorm at 67x67 needs (48,)'),
    (['a.keras', 'b.safetensors', '--variant', 'torchvison'], "did you mean 'torchvision'"),
    (['a.keras', 'b.safetensors', '--variant', 'torchvision', *SIZE], 'Keras has no layer like conv1'),
    (['a.keras', 'b.xyz', *named], 'b.xyz: unknown ending; choose from .safetensors'),
    (['a.keras', 'b.caffemodel', *named], 'batchnorm'),
    (['absent.pth', 'b.safetensors', *named], 'absent.pth: no such file'),
    (['torn.keras', 'b.safetensors', *named], 'torn.keras: broken'),
    (['code.pth', 'b.safetensors', '--variant', 'torchvision'], 'pth'),
    (['a.keras', 'b.safetensors', '--verify', '--images', 'none.jpg', *named], 'none.jpg'),
    (['a.safetensors', 'b.keras', '--verify'], 'is our own file'),
    (['a.keras', 'b.pth', '--names', 'torchvision', *named], '--names=torchvision: only for .safetensors'),
    (['.', 'b.keras'], "not a run's folder"),
    (['a.keras', 'nowhere/b.safetensors', *named], 'nowhere'),
  ]:
    assert main(['convert', *arguments]) == 2, arguments
    said = capsys.readouterr().err
    assert said.startswith('error: '), said
    assert said.count('\n') == 1, said
    assert message in said, said
    assert set(tmp_path.iterdir()) == there, arguments


@pytest.mark.parametrize('ending', ['.pth', '.keras', '.weights.h5', '.caffemodel', '.safetensors'])
def test_a_format_refuses_what_it_lacks_before_it_works(tmp_path, monkeypatch, ending):
  """Every writer and every network, also such as are not among the variants; what it says is the layer."""
  options = {'names': 'torchvision'} if ending == '.safetensors' else {}
  refused = {}
  specs = [spec.scaled(1 / 16, max(spec.smallest_image_size(), 67)) for spec in VARIANTS.values()]
  specs += [
    SMALL['batchnorm'].replace(kind, **changes)
    for kind, changes in (
      (BatchNorm, {'affine': False}),
      (Activation, {'kind': 'leaky_relu'}),
      (Activation, {'kind': 'elu'}),
      (Pool, {'kind': 'avg'}),
      (Pool, {'kind': 'max+avg'}),
      (Pool, {'padding': 1}),
      (Conv, {'ceil_mode': True}),
    )
  ]
  for number, spec in enumerate(specs):
    path = tmp_path / f'{number}{ending}'
    try:
      save_weights(path, spec, random_variables(spec, 5), **options)
    except UsageError as error:
      refused[number] = str(error)
      assert not list(tmp_path.iterdir())
    for file in tmp_path.iterdir():
      file.unlink()
  assert len(refused) < len(specs)
  for message in refused.values():
    assert 'no layer like' in message or 'images' in message or 'pad' in message
  if ending in ('.pth', '.safetensors'):
    lrn = list(VARIANTS).index('caffe')
    assert refused[lrn].startswith("torchvision's AlexNet has no layer like norm1 of caffe: ")


@pytest.mark.parametrize(
  ('variant', 'ending', 'pool', 'layer'),
  [
    (
      'torchvision',
      '.pth',
      {'kind': 'max+avg'},
      "torchvision's AlexNet has no layer like pool1 of torchvision",
    ),
    ('batchnorm', '.keras', {'kind': 'max+avg'}, 'Keras has no layer like pool1 of batchnorm'),
    ('batchnorm', '.weights.h5', {'padding': 1}, 'Keras has no layer like pool1 of batchnorm'),
    # Caffe's averages include padding.
    ('caffe', '.caffemodel', {'kind': 'avg', 'padding': 1}, 'Caffe has no layer like pool1 of caffe'),
    ('caffe', '.caffemodel', {'kind': 'max+avg', 'padding': 1}, 'Caffe has no layer like pool1 of caffe'),
  ],
)
def test_a_refusal_names_formats_that_hold_the_layer(tmp_path, variant, ending, pool, layer):
  spec = SMALL[variant].replace(Pool, **pool)
  variables = random_variables(spec, 5)
  with pytest.raises(UsageError) as refusal:
    save_weights(tmp_path / f'a{ending}', spec, variables)
  assert str(refusal.value).startswith(layer)
  assert 'our .safetensors and .stablehlo hold every network, .onnx' in str(refusal.value)
  assert (
    main(
      ['convert', str(save_weights(tmp_path / 'a.safetensors', spec, variables)[0]), str(tmp_path / 'a.onnx')]
    )
    == 0
  )


@pytest.mark.parametrize('ending', ['.pth', '.keras', '.weights.h5', '.caffemodel'])
def test_only_our_formats_and_onnx_hold_a_local_convolution(tmp_path, ending):
  inputs = VARIANTS['torchvision' if ending == '.pth' else 'caffe'].preprocessing
  spec = dataclasses.replace(VARIANTS['cifar10_local'], preprocessing=inputs).scaled(1 / 16)
  spec = spec.replace(Pool, ceil_mode=ending == '.caffemodel')  # as Caffe and Keras have them
  with pytest.raises(UsageError, match='no layer like conv3 of cifar10_local'):
    save_weights(tmp_path / f'a{ending}', spec, random_variables(spec, 5))


def test_of_several_files_all_are_written_or_none(tmp_path, capsys):
  source, _ = written(tmp_path, 'caffe', 'a.safetensors')
  (tmp_path / 'b.caffemodel.md').mkdir()
  assert main(['convert', source, str(tmp_path / 'b.caffemodel')]) == 2
  assert 'b.caffemodel.md: it is a folder' in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a.safetensors', 'b.caffemodel.md']


def test_refusals_come_before_work(tmp_path, capsys, monkeypatch):
  """Neither the other program runs, nor a network, before it is known that the file can be written."""
  monkeypatch.chdir(tmp_path)
  written(tmp_path, 'caffe', 'a.caffemodel')
  spec = SMALL['caffe'].replace(LocalResponseNorm, size=4)
  save_weights('even.safetensors', spec, random_variables(spec, 5))
  there = set(tmp_path.iterdir())
  monkeypatch.setattr(parity, 'compare', lambda *_: pytest.fail('the other program was run'))
  monkeypatch.setattr(PretrainedModel, 'logits', lambda *_: pytest.fail('the network was run'))
  named = ['--variant', 'caffe', *SIZE, '--verify']
  for arguments, message in [
    (['a.caffemodel', 'b.pth', *named], "torchvision's AlexNet has no layer like norm1 of caffe"),
    (['a.caffemodel', 'b.keras', *named], 'Keras has no layer like norm1 of caffe'),
    (
      ['a.caffemodel', 'nowhere/b.safetensors', *named],
      'cannot write nowhere/b.safetensors: there is no folder',
    ),
    (['even.safetensors', 'b.onnx'], 'norm1: ONNX places a window of 4 channels otherwise'),
    (['absent.caffemodel', 'b-0123abcd.pth'], 'must have the digest 0123abcd'),
  ]:
    assert main(['convert', *arguments]) == 2, arguments
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == there, arguments


@pytest.mark.parametrize(('ending', 'lost'), [('pth', True), ('safetensors', False)])
def test_a_crop_that_the_format_cannot_state(tmp_path, capsys, ending, lost):
  """A run that took whole images: a file without a description is read as its variant, which crops."""
  spec = SMALL['torchvision']
  whole = dataclasses.replace(spec.preprocessing, center_crop_share=1.0)
  save_weights(
    tmp_path / 'a.safetensors', dataclasses.replace(spec, preprocessing=whole), random_variables(spec, 5)
  )
  assert main(['convert', str(tmp_path / 'a.safetensors'), str(tmp_path / f'b.{ending}')]) == 0
  said = capsys.readouterr().out
  assert ('crops 87.5% of the short side, as torchvision does, and not 100.0%' in said) == lost


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_layers_that_the_format_does_not_describe(tmp_path, capsys, name):
  """A state dictionary is weights alone: whoever reads it as its variant would apply ReLU."""
  spec = SMALL['torchvision'].replace(Activation, kind='elu')
  save_weights(tmp_path / 'ours.safetensors', spec, random_variables(spec, 5))
  assert main(['convert', str(tmp_path / 'ours.safetensors'), str(tmp_path / name)]) == 0
  said = capsys.readouterr().out
  assert ("it does not say Activation(kind='elu'), which torchvision lacks" in said) == (name == 'a.pth')


@pytest.mark.parametrize(
  ('variant', 'name', 'size'),
  [
    ('batchnorm', 'a.keras', 67),
    ('caffe', 'a.caffemodel', 67),
    ('torchvision', 'a.pth', None),
    ('batchnorm', 'a.weights.h5', None),
  ],
)
def test_a_narrow_network_says_its_width_and_its_size(tmp_path, variant, name, size):
  """Width by the number of outputs; the size where the file says it, else the variant's."""
  spec = VARIANTS[variant].scaled(0.0625, size)
  variables = random_variables(spec, 5)
  save_weights(tmp_path / name, spec, variables)
  loaded = load_pretrained(tmp_path / name)
  assert loaded.spec == spec
  same(loaded.variables, variables)
