"""Shape bias and error consistency, as functions and as `alexnet-flax shape-bias`."""

import csv
import json
import pathlib

import numpy as np
import pytest

from alexnet_flax import VARIANTS, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.evaluation.shape_bias import CATEGORIES, COLUMNS, decide, error_consistency, shape_bias
from alexnet_flax.pretrained import imagenet_synsets, load_pretrained
from tests.helpers import encode, random_variables, smooth_image

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
NAMES = [
  'airplane1-bear2.png',
  'airplane10-airplane3.png',
  'bear1-dog1.png',
  'dog7-truck3.png',
  'truck2-bear1.png',
]


def test_categories():
  """As in the publication, which leaves out, among others, 10 of the dogs and 10 of the birds."""
  numbers = [number for classes in CATEGORIES.values() for number in classes]
  assert list(CATEGORIES) == sorted(CATEGORIES)
  assert len(set(numbers)) == len(numbers) == 207
  assert (len(CATEGORIES['dog']), len(CATEGORIES['bird']), len(CATEGORIES['truck'])) == (109, 49, 8)
  synsets = imagenet_synsets()
  of = {name: [synsets[number] for number in classes] for name, classes in CATEGORIES.items()}
  assert of['airplane'] == ['n02690373']
  assert of['bear'] == ['n02132136', 'n02133161', 'n02134084', 'n02134418']
  assert of['clock'] == ['n02708093', 'n03196217', 'n04548280']
  assert all('n02085620' <= synset <= 'n02113978' for synset in of['dog'])


def test_a_decision_is_the_greatest_mean_probability():
  logits = np.full((3, 1000), -5.0)
  logits[0, 404] = 1.0  # the one airplane
  logits[1, CATEGORIES['dog'][:50]] = 1.0  # 50 of 109 dogs, each as probable as the one oven
  logits[1, 766] = 1.0
  logits[2, 0] = 9.0  # no category's: of the others the knife is the most probable
  logits[2, 499] = -1.0
  assert decide(logits) == ['airplane', 'oven', 'knife']
  assert decide(np.zeros((0, 1000))) == []


def test_shape_bias_counts_conflicts():
  answers = ['airplane', 'airplane', 'dog', 'dog', 'na']
  found = shape_bias(dict(zip(NAMES, answers, strict=True)))
  assert {key: found[key] for key in ('images', 'shape', 'texture')} == {
    'images': 4,
    'shape': 2,
    'texture': 1,
  }
  assert found['shape_bias'] == pytest.approx(2 / 3)
  assert found['low'] < 2 / 3 < found['high']
  assert shape_bias({'cat1-dog1.png': 'oven'})['shape_bias'] is None


def test_error_consistency_is_cohens_kappa():
  from sklearn.metrics import cohen_kappa_score

  rng = np.random.default_rng(0)
  names = [f'cat{number}-dog1.png' for number in range(200)]
  right = rng.random((2, 200)) < [[0.7], [0.4]]
  first, second = (
    {name: 'cat' if one else 'na' for name, one in zip(names, row, strict=True)} for row in right
  )
  assert error_consistency(first, second) == pytest.approx(cohen_kappa_score(*right))
  assert error_consistency(first, first) == 1
  assert error_consistency(dict.fromkeys(names, 'cat'), dict.fromkeys(names, 'cat')) == 1
  assert error_consistency(dict.fromkeys(names, 'cat'), first) == pytest.approx(0)


def write_trials(path, responses, subject='subject-01', **changes):
  """A CSV as of the toolbox's raw data, in another order than the folder's, with people's names of images."""
  rows = []
  for number, (name, response) in enumerate(reversed(responses.items())):
    shape = name.split('-')[0].rstrip('0123456789')
    long = f'{number:04}_s5n_s01_0_{shape}_00_{name}'
    rows.append((subject, 1, number, 0.9, response, shape, 0, long))
  with open(path, 'w', newline='', encoding='utf-8') as file:
    csv.writer(file).writerows([changes.get('columns', COLUMNS), *rows])


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A folder in the toolbox's layout, with what macOS leaves in it, weights, and the trials of two people."""
  monkeypatch.chdir(tmp_path)
  for seed, name in enumerate(NAMES):
    folder = tmp_path / 'cue [conflict]' / name.split('-')[0].rstrip('0123456789')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encode(smooth_image(80, 90, seed), 'PNG'))
    (folder / f'._{name}').write_bytes(b'no image')
    (folder / '.DS_Store').touch()
  save_weights('net.safetensors', SPEC, random_variables(SPEC, 1000))
  write_trials('a.csv', dict(zip(NAMES, ['airplane', 'airplane', 'dog', 'dog', 'na'], strict=True)))
  write_trials('b.csv', dict(zip(NAMES, ['bear', 'oven', 'bear', 'dog', 'truck'], strict=True)), 'subject-02')
  return tmp_path


COMMAND = ['shape-bias', 'cue [conflict]', '--weights', 'net.safetensors']


def test_the_command(place, capsys):
  assert (
    main([*COMMAND, '--humans', 'a.csv', 'b.csv', '--out', 'ours.csv', '--json', '--figure', 'f.SVG']) == 0
  )
  out, notes = capsys.readouterr()
  found = json.loads(out)
  missing = ', '.join(sorted(set(CATEGORIES) - {'airplane', 'bear', 'dog', 'truck'}))
  assert notes == f'note: no images of {missing}: published figures are of 16 shapes\n'
  assert found['observers']['subject-01']['shape_bias'] == pytest.approx(2 / 3)
  # Each is right on three of five images, both on one, and either on all: (1/5 - 13/25) / (12/25).
  assert found['error_consistency_among_observers'] == pytest.approx(-2 / 3)

  drawn = pathlib.Path('f.SVG').read_text(encoding='utf-8')
  assert '>net.safetensors (torchvision), ' in drawn
  assert '>subject-01, 66.7%<' in drawn

  with open('ours.csv', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  assert [row['imagename'] for row in rows] == sorted(NAMES)
  network = load_pretrained('net.safetensors')
  files = sorted(pathlib.Path('cue [conflict]').rglob('[!.]*.png'))
  answers = network.classify([np.asarray(_image(file)) for file in files], top=1000)
  for row, classes in zip(rows, answers, strict=True):
    by_label = {one.label: one.probability for one in classes}
    means = {name: np.mean([by_label[label] for label in labels]) for name, labels in CATEGORIES.items()}
    assert row['object_response'] == max(means, key=means.get)
    assert row['category'] == row['imagename'].split('-')[0].rstrip('0123456789')

  assert main([*COMMAND, '--humans', 'ours.csv', 'a.csv']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == '4 images with a conflict, of 5'
  assert lines[3].endswith('net.safetensors (torchvision)')
  assert lines[4].split()[-2:] == ['1.000', 'net.safetensors']
  assert lines[5].split()[:2] == ['66.7', '%']


def _image(file):
  from alexnet_flax.data.images import read_image

  return read_image(str(file))


def spoil(place, what):
  """Makes the mistake of a name."""
  bear = place / 'cue [conflict]' / 'bear'
  match what:
    case 'name':
      (bear / 'bear one.png').write_bytes((bear / 'bear1-dog1.png').read_bytes())
    case 'category':
      (bear / 'bear2-dogg1.png').write_bytes((bear / 'bear1-dog1.png').read_bytes())
    case 'shape':
      (bear / 'cat2-dog1.png').write_bytes((bear / 'bear1-dog1.png').read_bytes())
    case 'twice':
      (bear / 'copy' / 'bear').mkdir(parents=True)
      (bear / 'copy' / 'bear' / 'bear1-dog1.png').write_bytes((bear / 'bear1-dog1.png').read_bytes())
    case 'broken':
      (bear / 'bear1-dog1.png').write_bytes(b'no image')
    case 'classes':
      save_weights('ten.safetensors', SPEC, random_variables(SPEC, 10))
    case 'names':
      names = [f'thing {number}' for number in range(1000)]
      save_weights('things.safetensors', SPEC, random_variables(SPEC, 1000), class_names=names)
    case 'columns':
      write_trials('c.csv', dict.fromkeys(NAMES, 'na'), columns=[*COLUMNS[:-1], 'image'])
    case 'fewer':
      write_trials('c.csv', dict.fromkeys(NAMES[:3], 'na'))
    case 'again':
      write_trials('c.csv', dict.fromkeys(NAMES, 'na'), 'subject-01')
    case 'bytes':
      (place / 'c.csv').write_bytes(b'subj,\xff')
    case 'empty':
      (place / 'c.csv').write_text(','.join(COLUMNS), encoding='utf-8')


@pytest.mark.parametrize(
  ('what', 'arguments', 'message'),
  [
    ('name', '', 'in cue [conflict]/bear: bear one.png: the name must be SHAPE1-TEXTURE1.png, such as'),
    ('category', '', "unknown category in bear2-dogg1.png: 'dogg'; did you mean 'dog'?"),
    ('shape', '', 'bear/cat2-dog1.png is not in the folder of its shape; it must be in a folder cat'),
    ('twice', '', 'bear/copy/bear/bear1-dog1.png and cue [conflict]/bear/bear1-dog1.png are the same image'),
    ('broken', '', 'cannot read cue [conflict]/bear/bear1-dog1.png: not an image'),
    (
      'classes',
      '--weights ten.safetensors',
      "ten.safetensors has 10 classes, which are not ImageNet's 1,000 in",
    ),
    (
      'names',
      '--weights things.safetensors',
      "has 1,000 classes, which are not ImageNet's 1,000 in their order",
    ),
    ('columns', '--humans c.csv', "c.csv has no column 'imagename'; it must have subj, session, trial, rt,"),
    (
      'fewer',
      '--humans c.csv',
      'subject-01 has trials with 3 images, and the folder 5; dog7-truck3.png is not in',
    ),
    ('again', '--humans a.csv c.csv', 'cannot read c.csv: subject-01 has two trials with truck2-bear1.png'),
    ('bytes', '--humans c.csv', 'cannot read c.csv: it is no CSV file in UTF-8'),
    ('empty', '--humans c.csv', 'no trials in c.csv'),
    ('absent', '--humans c.csv', 'cannot read c.csv: No such file or directory'),
    ('out', '--out nowhere/f.csv', 'cannot write nowhere/f.csv: there is no folder nowhere'),
  ],
)
def test_mistakes(place, capsys, what, arguments, message):
  spoil(place, what)
  assert main([*COMMAND, *arguments.split()]) == 2
  out, errors = capsys.readouterr()
  assert message in errors
  assert (out, len(errors.splitlines())) == ('', 1)


def test_what_is_not_one_folder_of_images(place, capsys):
  (place / 'empty').mkdir()
  for places, message in (
    (['empty'], 'no images in the folder empty'),
    (['a.csv'], 'a.csv is no folder; it must'),
    (['empty', 'a.csv'], 'name one folder, not 2: empty, a.csv'),
  ):
    assert main(['shape-bias', *places, 'net.safetensors']) == 2
    assert message in capsys.readouterr().err
