"""LPIPS as a function and as `alexnet-flax distance`; its values beside the authors' are in tests/parity."""

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, AlexNet, UsageError, lpips, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.inference import lpips as module
from alexnet_flax.weights import download
from alexnet_flax.weights.pth import dump_state_dict
from tests.helpers import encode, random_variables, smooth_image

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
CHANNELS = (4, 12, 24, 16, 16)
VARIABLES = random_variables(SPEC)
HEADS = tuple(np.random.default_rng(1).uniform(0, 1, count).astype(np.float32) for count in CHANNELS)


def heads_file(path, channels=CHANNELS):
  heads = HEADS if channels == CHANNELS else [np.ones(count, np.float32) for count in channels]
  named = {f'lin{number}.model.1.weight': head.reshape(1, -1, 1, 1) for number, head in enumerate(heads)}
  path.write_bytes(dump_state_dict(named))
  return path


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A folder with images, weights and heads, from which the command is called."""
  monkeypatch.chdir(tmp_path)
  save_weights('net.safetensors', SPEC, VARIABLES)
  heads_file(tmp_path / 'heads.pth')
  for folder, shift in (('a [1]', 0), ('b', 1), ('fewer', 1)):
    (tmp_path / folder / 'more').mkdir(parents=True)
    for number, name in enumerate(('x y.png', 'more/é.png')):
      (tmp_path / folder / name).write_bytes(encode(smooth_image(40, 48, number + shift), 'PNG'))
    (tmp_path / folder / '.hidden.png').write_bytes(b'no image')
    (tmp_path / folder / 'notes.txt').touch()
  (tmp_path / 'fewer' / 'x y.png').unlink()
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'broken.png').write_bytes(b'no image')
  (tmp_path / 'tiny.png').write_bytes(encode(smooth_image(30, 48, 0), 'PNG'))
  (tmp_path / 'large.png').write_bytes(encode(smooth_image(40, 50, 0), 'PNG'))
  return tmp_path


NETWORK = ['--weights', 'net.safetensors', '--heads', 'heads.pth']


@jax.jit
def taps(inputs):
  return AlexNet(SPEC).apply(VARIABLES, inputs, train=False, endpoints=True)[1]


@jax.jit
def distances(variables, first, second):
  """The distances, and the gradient of their sum by the first images."""

  def total(first):
    found = lpips(AlexNet(SPEC), variables, HEADS, first, second)
    return found.sum(), found

  gradient, found = jax.grad(total, has_aux=True)(first)
  return found, gradient


def expected(first, second):
  """By the definition, in NumPy: [N, H, W, 3] in 0 ... 1."""
  mean, std, total = SPEC.preprocessing.mean, SPEC.preprocessing.std, 0.0
  first, second = (taps(np.float32((image - mean) / std)) for image in (first, second))
  for layer, head in zip(module.LAYERS, HEADS, strict=True):
    one, other = (np.float64(taps[layer]) for taps in (first, second))
    one, other = (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in (one, other))
    total = total + (((one - other) ** 2) * head).sum(-1).mean((1, 2))
  return total


IMAGES = np.stack([smooth_image(67, 67, seed) for seed in range(3)]) / np.float32(255)


def test_the_definition():
  first, second = IMAGES[[0, 1, 2]], IMAGES[[1, 2, 2]]
  found, gradient = distances(VARIABLES, first, second)
  np.testing.assert_allclose(found, expected(first, second), rtol=1e-5, atol=1e-7)
  assert found[0] > 0.01
  assert found[2] == 0
  assert not np.any(gradient[2])
  step = 0.01 * gradient / np.linalg.norm(gradient)
  up, down = (distances(VARIABLES, one, second)[0].sum() for one in (first + step, first - step))
  assert float(up - down) == pytest.approx(2 * float((gradient * step).sum()), rel=0.05)


def test_positions_without_any_activation_have_a_gradient_of_zero():
  """The package lpips has NaN there."""
  silent = {'kernel': np.zeros((11, 11, 3, 4), np.float32), 'bias': np.full(4, -1, np.float32)}
  variables = VARIABLES | {'params': VARIABLES['params'] | {'conv1': silent}}
  _, gradient = distances(variables, IMAGES, IMAGES[::-1])
  assert not np.any(gradient)


def test_what_the_function_refuses():
  model, image = AlexNet(SPEC), np.zeros((1, 40, 40, 3), np.float32)
  with pytest.raises(ValueError, match='must have one shape'):
    lpips(model, VARIABLES, HEADS, image, image[:, 1:])
  with pytest.raises(TypeError, match=r'must be floats in 0 \.\.\. 1'):
    lpips(model, VARIABLES, HEADS, image.astype(np.uint8), image)
  with pytest.raises(ValueError, match='too small'):
    lpips(model, VARIABLES, HEADS, image[:, :30], image[:, :30])


@pytest.mark.parametrize('variant', sorted(set(VARIANTS) - {'torchvision'}))
def test_other_networks_are_refused(variant):
  with pytest.raises(UsageError, match=f"LPIPS is by torchvision's AlexNet, not by {variant}; give weights"):
    module.trunk(VARIANTS[variant])


def test_two_images_and_two_folders(place, capsys):
  assert main(['distance', 'a [1]', 'b', *NETWORK]) == 0
  *lines, mean = capsys.readouterr().out.splitlines()
  assert [line.split(maxsplit=1)[1] for line in lines] == [
    'a [1]/more/é.png  b/more/é.png',
    'a [1]/x y.png  b/x y.png',
  ]
  each = [float(line.split()[0]) for line in lines]
  assert mean.endswith('  mean of 2 pairs')
  assert float(mean.split()[0]) == pytest.approx(np.mean(each), abs=2e-6)
  assert main(['distance', 'a [1]/x y.png', 'b/x y.png', *NETWORK, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['pairs'][0]['lpips'] == found['mean'] == pytest.approx(each[1], abs=1e-6)
  images = [np.float64(smooth_image(40, 48, seed))[None] / 255 for seed in (0, 1)]
  network = AlexNet(SPEC)
  direct = lpips(network, VARIABLES, HEADS, *(jnp.asarray(np.float32(one)) for one in images))
  assert found['mean'] == pytest.approx(float(direct[0]), abs=1e-6)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('a+[1] b/x+y.png', 'a [1] is a folder and b/x y.png is not; name two images or two folders'),
    ('b fewer', 'b has x y.png, which fewer lacks; the names must be the same'),
    ('fewer b', 'b has x y.png, which fewer lacks'),
    ('empty b', 'no images in the folder empty'),
    ('b', 'name two images, or two folders, not 1'),
    ('b b b', 'name two images, or two folders, not 3'),
    ('b b net.safetensors', 'are both networks; name one of them'),
    ('absent.png b/x+y.png', 'cannot read absent.png: No such file or directory'),
    ('broken.png b/x+y.png', 'cannot read broken.png: not an image'),
    ('tiny.png tiny.png', 'tiny.png has 48x30 pixels; LPIPS needs at least 31x31'),
    (
      'large.png b/x+y.png',
      'large.png and b/x y.png have 50x40 and 48x40 pixels; LPIPS is of images of one size',
    ),
    ('b b --heads absent.pth', 'absent.pth: no such file'),
    ('b b --heads broken.png', 'broken.png: not a weights file'),
    (
      'b b --heads net.safetensors',
      'does not hold heads for this AlexNet, but those of another network; they',
    ),
    (
      'b b --heads vgg.pth',
      "vgg.pth does not hold heads for this AlexNet, but those of VGG; give the authors'",
    ),
    ('b b --weights caffe.safetensors', "LPIPS is by torchvision's AlexNet, not by caffe; give weights of"),
  ],
)
def test_mistakes(place, capsys, arguments, message):
  if 'vgg' in arguments:
    heads_file(place / 'vgg.pth', (64, 128, 256, 512, 512))
  if 'caffe' in arguments:
    spec = VARIANTS['caffe'].scaled(1 / 16, 67)
    save_weights('caffe.safetensors', spec, random_variables(spec))
  words = [word.replace('+', ' ') for word in arguments.split()]
  assert main(['distance', *NETWORK, *words]) == 2
  out, errors = capsys.readouterr()
  assert message in errors
  assert (out, len(errors.splitlines())) == ('', 1)


def test_heads_without_the_package(tmp_path, monkeypatch):
  """They are downloaded once, and must have the digest of the published file."""
  asked = []
  content = heads_file(tmp_path / 'heads.pth', tuple(16 * count for count in CHANNELS)).read_bytes()

  def fetch(url, path, length_needed):
    asked.append(url)
    path.write_bytes(content)

  monkeypatch.setenv('ALEXNET_FLAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(download, '_fetch', fetch)
  with pytest.raises(UsageError, match='wrong digest'):
    module.load_heads()
  monkeypatch.setattr(module, '_DIGEST', hashlib.sha256(content).hexdigest())
  for _ in range(2):
    assert [head.size for head in module.load_heads()] == [64, 192, 384, 256, 256]
  assert [url.split('/')[-4:] for url in asked] == [['lpips', 'weights', 'v0.1', 'alex.pth']] * 2
  assert os.listdir(tmp_path / 'cache')
