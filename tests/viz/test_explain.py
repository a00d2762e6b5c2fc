"""`alexnet-flax explain`: figures, the classes that they explain, and mistakes."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from alexnet_flax import VARIANTS, Activation, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.inference.attributions import METHODS
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.viz.explain import MOST
from tests.helpers import random_variables, smooth_image

SPEC = VARIANTS['cifar10_80sec'].scaled(1 / 4)
NAMES = ['cat', 'great_white_shark', 'temple', 'flower', 'sea', '4', 'Cat']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Networks with ReLU and with ELU, and three files of images, of which one is none."""
  folder = tmp_path_factory.mktemp('explain')
  for name, kind in (('relu', 'relu'), ('elu', 'elu')):
    spec = SPEC.replace(Activation, kind=kind)
    save_weights(folder / f'{name}.safetensors', spec, random_variables(spec, 7), class_names=NAMES)
  (folder / 'images [1]').mkdir()
  for number, name in enumerate(('a', '猫 b')):
    Image.fromarray(smooth_image(40, 50, number)).save(folder / 'images [1]' / f'{name}.png')
  (folder / 'broken.png').write_bytes(b'no image')
  return folder


@pytest.fixture
def explained(folder, capsys):
  """explained(*arguments): the exit code, the lines and the errors; {} is the folder."""

  def call(*arguments):
    code = main(['explain', *(text.replace('{}', str(folder)) for text in arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err

  return call


def test_all_methods_of_all_images_in_one_figure(explained, folder, tmp_path):
  out = tmp_path / 'all.svg'
  code, lines, error = explained('{}/images [1]', '{}/relu.safetensors', '--out', str(out), '--steps', '256')
  assert (code, error, lines[-1]) == (0, '', str(out))
  network = load_pretrained(folder / 'relu.safetensors')
  text = out.read_text(encoding='utf-8')
  for name in METHODS:
    assert text.count(f'>{name.replace("_", " ")}<') == 1
  assert text.count('<image') == 2 * (1 + len(METHODS))
  for name, line in zip(('a', '猫 b'), lines, strict=False):
    image = np.asarray(Image.open(folder / 'images [1]' / f'{name}.png'))
    ((best, *_),) = network.classify([image])
    assert line.startswith(f'{folder}/images [1]/{name}.png: {best.name} {best.probability:.1%}; ')
    assert f'>{best.name}  {best.probability:.1%}<' in text
    total, difference = map(float, re.findall(r'sum to (\S+) of (\S+)$', line)[0])
    assert total == pytest.approx(difference, rel=0.05, abs=0.002)


def test_too_few_steps_are_noted(explained, tmp_path):
  arguments = '{}/images [1]', '{}/relu.safetensors', '--methods', 'integrated_gradients', '--steps', '1'
  code, _, error = explained(*arguments, '--out', str(tmp_path / 'a.png'))
  assert code == 0
  assert re.fullmatch(r'note: integrated gradients of [12] images .* 5%; --steps 4 comes nearer\n', error)


def test_a_figure_of_each_image_and_a_class(explained, folder, tmp_path):
  out = tmp_path / 'maps'
  arguments = ['{}/images [1]', '{}/broken.png', '{}/relu.safetensors', '--methods', 'occlusion, gradient']
  code, lines, error = explained(*arguments, '--out', str(out), '--class', 'Great white SHARK')
  assert code == 2
  assert error.splitlines()[-1] == 'error: 1 of the images cannot be read'
  assert f'cannot read {folder}/broken.png: not an image' in error
  assert sorted(path.name for path in out.iterdir()) == ['a-explained.png', '猫 b-explained.png']
  assert [': great white shark ' in line for line in lines] == [True, True]
  assert lines[0].endswith(str(out / 'a-explained.png'))
  drawn = np.asarray(Image.open(out / 'a-explained.png'))
  assert drawn.shape[1] > 3 * 400  # three panels
  assert drawn.std() > 20


def test_a_network_without_relu(explained, tmp_path):
  out = str(tmp_path / 'a.pdf')
  methods = 'guided_backprop,gradient'
  code, _, error = explained('{}/images [1]', '{}/elu.safetensors', '--methods', methods, '--out', out)
  assert code == 0
  assert (
    error
    == "note: guided_backprop can only change ReLU's derivative, and this network has no ReLU; left out\n"
  )
  assert pathlib.Path(out).read_bytes().startswith(b'%PDF')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ['--methods', 'gradient,grad-cam'],
      "unknown method 'grad-cam'; did you mean 'grad_cam'? (choices: gradient,",
    ),
    (['--steps', '0'], '--steps (=0) must be at least 1'),
    (['--methods', ''], "unknown method ''"),
    (['--class', 'tempel'], "there is no class 'tempel'; did you mean 'temple'"),
    (['--class', '7'], "there is no class '7'; give a name, or a number in 0 ... 6"),
    (['--class', 'cat'], "'cat' is the name of the classes 0, 6; give a number"),
    (['--out', 'a.jpg'], '--out a.jpg: the ending must be .png, .svg or .pdf; or name a folder'),
    (['--out', '/dev/full'], '--out /dev/full: the ending must be .png, .svg or .pdf; or name a folder'),
    (['--out', '{}/absent/a.png'], 'there is no folder'),
    (['--out', '{}/broken.png/a'], 'cannot write to --out'),
    (['{}/elu.safetensors'], 'are both networks'),
    (
      ['--weights', '{}/elu.safetensors', '--methods', 'deconvnet'],
      'this network has no ReLU; take gradient',
    ),
    (['{}/images [1]/a.png'] * MOST, 'are too many for one figure; --out FOLDER draws one of each'),
  ],
)
def test_mistakes(explained, arguments, message):
  network = [] if '--weights' in arguments else ['{}/relu.safetensors']
  code, lines, error = explained('{}/images [1]', *network, *arguments)
  assert (code, lines) == (2, [])
  assert message in error
  assert len(error.splitlines()) == 1


def test_classes_by_name_and_number(folder):
  network = load_pretrained(folder / 'relu.safetensors')
  assert [network.label_of(text) for text in ('temple', 'great_white_shark', '2', '4', '6')] == [
    2,
    1,
    2,
    5,
    6,
  ]
