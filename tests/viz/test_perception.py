"""Figures of attacks, calibration, shape bias and distance, as functions and by `--figure`."""

import json
import re

import numpy as np
import pytest

from alexnet_flax import VARIANTS, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.evaluation.scores import Predictions
from alexnet_flax.viz.perception import draw_distances, draw_evaluation, draw_shape_bias
from alexnet_flax.weights.pth import dump_state_dict
from tests.helpers import encode, random_variables, smooth_image

TOP1 = ({'value': 0.7, 'low': 0.6, 'high': 0.8}, {'value': 0.2, 'low': 0.1, 'high': 0.3})
COMMON = {'dataset': '$digits:test', 'networks': [{'source': 'a<b>', 'variant': 'caffe'}]}


def markers(text):
  """The number of markers of each curve of an SVG."""
  return [group.count('<use') for group in re.findall(r'<g clip-path[^>]*>(?:\s*<use[^>]*/>)+', text)]


def drawn(path):
  text = path.read_text(encoding='utf-8')
  return text, re.findall(r'<text[^>]*>([^<]*)</text>', text)


@pytest.mark.parametrize(
  ('norm', 'x_label', 'tick'),
  [('linf', 'epsilon in linf', '2/255'), ('l2', 'epsilon in l2', '0.01')],
)
def test_accuracies(tmp_path, norm, x_label, tick):
  common = {'method': 'pgd', 'norm': norm, 'steps': 7, 'images': 1000}
  rows = [
    {**common, 'epsilon': epsilon, 'top1': top1} for epsilon, top1 in zip((4 / 255, 0), TOP1, strict=True)
  ]
  for number, attacks in enumerate((rows, rows[::-1])):
    draw_evaluation(COMMON | {'attacks': attacks}, tmp_path / f'{number}.svg')
  text, words = drawn(tmp_path / '0.svg')
  assert text == (tmp_path / '1.svg').read_text(encoding='utf-8')  # the order does not matter
  for one in (x_label, tick, 'accuracy', 'top-1', '95 % interval', 'a&lt;b&gt; (caffe)'):
    assert one in words
  assert 'PGD of 7 steps on $digits:test, 1,000 images' in words
  assert markers(text) == [1, 2]  # the interval is one shape


def scored(confidence, hits):
  """The figures of predictions of two classes."""
  count = len(hits)
  found = Predictions(
    np.zeros((count, 1), int),
    np.array(confidence)[:, None],
    np.zeros(count),
    [(0 if hit else 1,) for hit in hits],
    np.arange(count),
  )
  return {'calibration_error': found.calibration_error(), 'calibration_bins': found.calibration_bins()}


def test_reliability(tmp_path):
  before = scored([0.55, 0.58, 0.9, 1.0], [False, True, True, True])
  bins = before['calibration_bins']
  assert [bins['images'][number] for number in (8, 13, 14)] == [2, 1, 1]
  assert sum(bins['images']) == 4
  assert (bins['confidence'][8], bins['correct'][8]) == (pytest.approx(1.13), 1)
  scaling = {'temperatures': [0.5, 2], **scored([0.7, 0.75, 0.98, 1.0], [False, True, True, True])}
  results = COMMON | {'images': 4} | before
  draw_evaluation(results, tmp_path / 'one.svg')
  draw_evaluation(results | {'temperature_scaling': {'error': 'none is best'}}, tmp_path / 'error.svg')
  draw_evaluation(results | {'temperature_scaling': scaling}, tmp_path / 'two.svg')
  text, words = drawn(tmp_path / 'one.svg')
  assert text == (tmp_path / 'error.svg').read_text(encoding='utf-8')
  label = f'at temperature 1: calibration error {before["calibration_error"]:.2%}'
  for one in ('$digits:test, 4 images', 'accuracy', 'confidence', 'images', label):
    assert one in words
  assert markers(text) == [3]
  text, words = drawn(tmp_path / 'two.svg')
  assert f'at temperature 0.5 and 2: calibration error {scaling["calibration_error"]:.2%}' in words
  assert label in words
  assert markers(text) == [3, 3]


def test_shape_bias(tmp_path):
  names = ['cat1-dog1.png', 'cat2-dog1.png', 'dog1-cat1.png', 'bear1-bear2.png', 'oven1-cat1.png']
  network, person, neither = (
    dict(zip(names, answers, strict=True))
    for answers in (['cat', 'dog', 'cat', 'bear', 'car'], ['cat', 'cat', 'dog', 'bear', 'oven'], ['car'] * 5)
  )
  observers = {'net (caffe)': network, 'subject-01': person, 'subject-02': neither}
  draw_shape_bias(observers, tmp_path / 'a.svg')
  text, words = drawn(tmp_path / 'a.svg')
  for one in (
    'net (caffe), 33.3%',
    'subject-01, 100.0%',
    'subject-02, neither',
    'shape decisions, the others',
  ):
    assert any(word.startswith(one) for word in words)
  assert [word for word in words if word.isalpha()] == [
    'cat',
    'dog',
    'oven',
  ]  # a bear of bears is no conflict
  assert markers(text) == [2, 3]  # not the oven's, which the network takes for a car


SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save_weights('net.safetensors', SPEC, random_variables(SPEC, 1000))
  heads = [np.ones((1, count, 1, 1), np.float32) for count in (4, 12, 24, 16, 16)]
  (tmp_path / 'heads.pth').write_bytes(
    dump_state_dict({f'lin{number}.model.1.weight': head for number, head in enumerate(heads)})
  )
  for folder, inverted in (('a', 0), ('b', 255)):
    (tmp_path / folder).mkdir()
    for number in range(9):
      image = smooth_image(40, 48, 0).copy()
      image[20:, 24:] ^= inverted * (number != 0)
      (tmp_path / folder / f'{number}.png').write_bytes(encode(image, 'PNG'))
  return tmp_path


def test_distances(place, capsys, monkeypatch):
  found = []
  monkeypatch.setattr(
    'alexnet_flax.viz.perception.draw_distances', lambda *all_: (found.append(all_), draw_distances(*all_))
  )
  command = ['distance', 'a', 'b', 'net.safetensors', '--heads', 'heads.pth']
  assert main([*command, '--figure', 'd.SVG', '--json']) == 0
  distance = json.loads(capsys.readouterr().out)['pairs'][1]['lpips']
  text, words = drawn(place / 'd.SVG')
  assert text.count('<image') == 8 * 3 + 1  # and the bar of colours
  assert [word for word in words if word.endswith('.png')] == [f'{i // 2}.png' for i in range(16)]
  assert [word for word in words if 'LPIPS' in word] == ['LPIPS 0.0000'] + [f'LPIPS {distance:.4f}'] * 7
  ((_, _, (equal, other, *_), _),) = found
  assert equal.shape == other.shape == (40, 48)
  assert equal.max() < 1e-9
  assert other[25:, 30:].mean() > 3 * other[:15, :18].mean()


@pytest.mark.parametrize(
  'command',
  ['distance a b', 'shape-bias a', 'evaluate --dataset digits', 'evaluate --attack pgd --dataset digits'],
)
@pytest.mark.parametrize(
  ('figure', 'message'),
  [
    ('f.pdf', '--figure f.pdf: the ending must be .svg or .png'),
    ('figure', '--figure figure: the ending must be .svg or .png'),
    ('nowhere/f.svg', 'cannot write nowhere/f.svg: there is no folder nowhere'),
  ],
)
def test_refused_before_the_work(place, capsys, command, figure, message):
  """Before weights that are none are read."""
  assert main([*command.split(), '--weights', 'heads.pth', '--figure', figure]) == 2
  out, errors = capsys.readouterr()
  assert message in errors
  assert (out, len(errors.splitlines())) == ('', 1)


def test_many_data_sets(place, capsys):
  command = ['evaluate', 'net.safetensors', '--dataset', 'imagenet2012_corrupted', '--figure', 'f.svg']
  assert main(command) == 2
  assert '--figure is for one data set; name a part of this one, such as imagenet' in capsys.readouterr().err
