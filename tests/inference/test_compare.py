"""`alexnet-flax compare`: files of features of every format, ours and others', and what it refuses."""

import csv
import json
import os
import zipfile

import h5py
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from alexnet_flax import VARIANTS, load_pretrained, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.inference.compare import compare_files
from alexnet_flax.inference.feature_files import read_features, read_layer, write_features
from tests.helpers import encode, random_variables, smooth_image

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
LAYERS = ['relu1', 'relu5', 'fc7']
NAMES = ['b [1].png', '猫/a.png', '$c$ d.png', 'b1.png', 'e.png']


@pytest.fixture(scope='module')
def stimuli(tmp_path_factory):
  """Five images, of names with brackets, spaces and other scripts, in a folder of such a name."""
  folder = tmp_path_factory.mktemp('stimuli [1] größe')
  (folder / '猫').mkdir()
  for number, name in enumerate(NAMES):
    (folder / name).write_bytes(encode(smooth_image(80 + number, 90 - number, number), 'PNG'))
  (folder / 'list.txt').write_text('\n'.join(NAMES), encoding='utf-8')
  return folder


@pytest.fixture(scope='module')
def files(stimuli):
  """Features of two networks, in each format, by way of the list."""
  for seed in (0, 1):
    weights = stimuli / f'w{seed}.safetensors'
    save_weights(weights, SPEC, random_variables(SPEC, 5, seed))
    for ending in ('h5', 'hdf5', 'npz'):
      out, listed = stimuli / f'f{seed}.{ending}', ['--list', str(stimuli / 'list.txt')]
      command = [
        'features',
        *listed,
        '--weights',
        str(weights),
        '--layers',
        ','.join(LAYERS),
        '--out',
        str(out),
      ]
      assert main(command) == 0
  return stimuli


def names(ending):
  return [f'f{seed}.{ending}' for seed in (0, 1)]


def expected(files, first, second):
  """Spearman's rho by SciPy, from distances by SciPy."""
  pair = [np.load(files / f'f{seed}.npz') for seed in (0, 1)]
  rdms = [
    pdist(found[layer].reshape(5, -1).astype(float), 'correlation')
    for found, layer in zip(pair, (first, second), strict=True)
  ]
  return spearmanr(*rdms).statistic


@pytest.mark.parametrize('endings', [('h5', 'h5'), ('hdf5', 'npz'), ('npz', 'npz')])
def test_every_format(files, monkeypatch, capsys, endings):
  monkeypatch.chdir(files)
  pair = [f'f{seed}.{ending}' for seed, ending in enumerate(endings)]
  assert main(['compare', *pair, '--out', 'o [1].csv', '--figure', 'f.svg']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == 'rsa-spearman of correlation distances, 5 stimuli'
  assert lines[1] == f'rows {pair[0]}, columns {pair[1]}'
  assert lines[2].split() == LAYERS
  with open('o [1].csv', encoding='utf-8', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [(row['first_layer'], row['second_layer']) for row in rows] == [
    (a, b) for a in LAYERS for b in LAYERS
  ]
  values = [float(row['similarity']) for row in rows]
  np.testing.assert_allclose(values, [expected(files, a, b) for a in LAYERS for b in LAYERS], atol=1e-9)
  cells = [cell for line in lines[3:] for cell in line.split()[1:]]
  assert cells == [f'{value:.3f}' for value in values]
  assert 'rsa-spearman' in (files / 'f.svg').read_text(encoding='utf-8')


def test_json_says_what_was_compared(files, monkeypatch, capsys):
  monkeypatch.chdir(files)
  flags = ['--measure', 'rsa-kendall', '--distance', 'cosine', '--bootstrap', '20', '--layers', 'fc7, relu1']
  assert main(['compare', 'f0.h5', 'f1.npz', 'f0.npz', *flags, '--out', 'o.json', '--figure', 'f.png']) == 0
  found = json.loads((files / 'o.json').read_text(encoding='utf-8'))
  assert (found['measure'], found['distance'], found['bootstrap']) == ('rsa-kendall', 'cosine', 20)
  digests = [one['attributes']['weights_sha256'] for one in found['files']]
  assert digests[0] == digests[2] != digests[1]
  other, same = found['comparisons']
  assert other['first_layers'] == other['second_layers'] == ['fc7', 'relu1']
  np.testing.assert_allclose(np.diag(same['similarity']), 1)
  low, high = np.array(other['interval'])
  assert (low <= high).all()
  assert capsys.readouterr().out.startswith(
    'rsa-kendall of cosine distances, 5 stimuli, 95 % intervals of 20 draws'
  )
  assert (files / 'f.png').read_bytes().startswith(b'\x89PNG')


def test_rows_are_matched_by_content_and_not_by_path_or_order(files, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for number, name in enumerate(reversed(NAMES)):
    (tmp_path / f'{number}.png').write_bytes((files / name).read_bytes())
  network = load_pretrained(files / 'w0.safetensors')
  write_features(network, ['.'], LAYERS, 'other.npz', batch_size=2)
  said = []
  result = compare_files([str(files / 'f0.h5'), 'other.npz'], 'cka', say=said.append)
  np.testing.assert_allclose(np.diag(result.comparisons[0].similarity), 1)
  assert said == []


def test_files_of_other_programs(files, tmp_path, monkeypatch, capsys):
  """Without names, in groups of HDF5, with bare names in another order."""
  monkeypatch.chdir(tmp_path)
  with np.load(files / 'f0.npz') as stored:
    layer = stored['fc7']
  np.savez('plain.npz', IT=layer, labels=np.arange(5))
  with h5py.File('group.h5', 'w') as file:
    file['subject 1/IT'] = layer.astype(int)
    file['names'] = [os.path.basename(name) for name in NAMES]
  np.savez('turned.npz', IT=layer[::-1], names=[os.path.basename(name) for name in reversed(NAMES)])
  ours = str(files / 'f0.h5')
  assert (
    main(['compare', ours, 'plain.npz', 'turned.npz', 'group.h5', '--layers', 'fc7,IT,subject 1/IT']) == 0
  )
  out, notes = capsys.readouterr()
  assert [line.split()[1] for line in out.splitlines() if line.startswith('fc7')][:2] == ['1.000', '1.000']
  assert notes.splitlines() == [
    'note: plain.npz does not name its stimuli: its 5 rows are taken to be in the same order',
    f'note: the stimuli of {ours} and turned.npz are matched by their names without folders',
    f'note: the stimuli of {ours} and group.h5 are matched by their names without folders',
  ]


@pytest.mark.parametrize('names', [{}, {'names': ['image'] * 5}])
def test_two_files_without_names(tmp_path, monkeypatch, capsys, names):
  monkeypatch.chdir(tmp_path)
  rows = np.random.default_rng(0).normal(size=(5, 8))
  np.savez('a.npz', layer=rows)
  np.savez('b.npz', layer=rows, **names)
  assert main(['compare', 'a.npz', 'b.npz', '--measure', 'cka-debiased']) == 0
  out, notes = capsys.readouterr()
  assert out.splitlines()[3].split() == ['layer', '1.000']
  assert notes == 'note: a.npz does not name its stimuli: its 5 rows are taken to be in the same order\n'


def test_what_a_file_says(files):
  for ending in ('h5', 'npz'):
    found = read_features(str(files / f'f0.{ending}'))
    assert found.layers == tuple(LAYERS)
    assert found.names == [str(files / name) for name in NAMES]
    assert found.stimuli == len(set(found.digests)) == 5
    assert found.attributes['variant'] == 'torchvision'
    assert {'weights_sha256', 'preprocessing', 'versions', 'pool', 'image_size'} <= set(found.attributes)
    assert read_layer(found, 'fc7').shape == (5, 256)


def test_a_noise_ceiling(tmp_path, monkeypatch, capsys):
  """Of two subjects, whose layers and stimuli are in different orders."""
  monkeypatch.chdir(tmp_path)
  angles = {'a': (0, 10, 30), 'b': (20, 0, 50)}  # ranks of the distances 01, 02, 12: 1, 3, 2 and 1, 2, 3
  rows = {key: np.stack([np.cos(np.deg2rad(of)), np.sin(np.deg2rad(of))], 1) for key, of in angles.items()}
  names = ['0.png', '1.png', '2.png']
  np.savez('model.npz', fc7=rows['a'], names=names)
  np.savez('s1.npz', V4=rows['b'], IT=rows['a'], names=names)
  np.savez('s2.npz', IT=rows['b'][::-1], V4=rows['b'][::-1], names=names[::-1])
  flags = ['--ceiling', '--distance', 'cosine', '--layers', 'fc7,IT,V4,IT', '--figure', 'f.PNG']
  for out in ('o.CSV', 'o.JSON'):
    assert main(['compare', 'model.npz', 's1.npz', 's2.npz', *flags, '--out', out]) == 0
  assert [line.split() for line in capsys.readouterr().out.splitlines()[-5:]] == [
    ['mean', 'of', '2', 'subjects,', 'and', 'their', 'noise', 'ceiling'],
    ['IT', 'V4'],
    ['fc7', '0.750', '0.500'],  # rho is 1 and 0.5; 0.5 and 0.5
    ['lower', 'bound', '0.500', '1.000'],  # between both subjects
    ['upper', 'bound', '0.866', '1.000'],  # of 1, 3, 2 and the mean of both, 1, 2.5, 2.5
  ]
  expected = {'IT': [0.5, 3**0.5 / 2], 'V4': [1, 1]}
  found = json.loads((tmp_path / 'o.JSON').read_text(encoding='utf-8'))['ceilings']
  assert found == {layer: pytest.approx(bounds) for layer, bounds in expected.items()}
  with open('o.CSV', encoding='utf-8', newline='') as file:
    for row in csv.DictReader(file):
      bounds = float(row['ceiling_low']), float(row['ceiling_high'])
      assert bounds == pytest.approx(expected[row['second_layer']])
  assert (tmp_path / 'f.PNG').read_bytes().startswith(b'\x89PNG')


def plain(path, **changes):
  rows = np.random.default_rng(0).normal(size=(5, 8))
  np.savez(path, **({'fc7': rows, 'names': [f'{number}.png' for number in range(5)]} | changes))


@pytest.fixture
def bad(tmp_path, monkeypatch):
  """A good file, and one for each fault."""
  monkeypatch.chdir(tmp_path)
  rows = np.random.default_rng(0).normal(size=(5, 8))
  plain('good.npz')
  plain('none.npz', fc7=np.where(np.arange(5)[:, None] == 3, np.nan, rows))
  plain('equal.npz', fc7=np.ones((5, 8)))
  plain('large.npz', fc7=rows * np.where(np.arange(5) == 2, 1e200, 1)[:, None])
  plain('it.npz', IT=rows)
  with h5py.File('uneven.h5', 'w') as file:
    file['fc7'], file['fc8'] = rows, rows[:4]
  plain('one.npz', fc7=rows[:1], names=['0.png'])
  plain('others.npz', names=['0.png', '1.png', 'x.png', 'y.png', 'z\n.png'])
  plain('uneven.npz', relu1=rows[:4])
  np.savez('short.npz', fc7=rows[:4])
  np.savez('labels.npz', labels=np.arange(5))
  np.savez('object.npz', fc7=rows, names=np.array(['a'] * 5, object))
  np.savez('empty_rows.npz', fc7=rows[:0])
  (tmp_path / 'empty [0].npz').touch()
  with zipfile.ZipFile(tmp_path / 'other.zip', 'w') as archive:
    archive.writestr('names', 'no array')
  (tmp_path / 'text.h5').write_text('no features', encoding='utf-8')
  (tmp_path / 'cut.npz').write_bytes((tmp_path / 'good.npz').read_bytes()[:200])
  (tmp_path / 'cut.h5').write_bytes(b'\x89HDF\r\n\x1a\n')
  os.mkfifo('pipe.h5')
  return tmp_path


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('', 'name at least two files of features'),
    ('absent.npz', 'cannot read absent.npz: No such file or directory'),
    ('.', 'cannot read .: Is a directory'),
    ('pipe.h5', 'cannot read pipe.h5: not a regular file'),
    ('empty+[0].npz', 'empty [0].npz is empty; `alexnet-flax features` writes'),
    ('text.h5', 'text.h5 is neither HDF5 nor .npz'),
    ('cut.npz', 'cannot read cut.npz: File is not a zip file'),
    ('cut.h5', 'cannot read cut.h5: '),
    ('object.npz', 'cannot read object.npz: Object arrays cannot be loaded'),
    ('labels.npz', 'labels.npz has no layer: no array of numbers [N, ...]'),
    ('other.zip', 'other.zip has no layer: no array of numbers [N, ...]'),
    ('uneven.npz', 'must have a row for each stimulus, but their rows are: fc7 5, relu1 4, names 5'),
    ('none.npz', 'none.npz: fc7: the activations of 3.png are NaN or infinite; leave them out'),
    (
      'equal.npz',
      'equal.npz: fc7: the activations of 0.png, 1.png, 2.png and 2 more are all equal: the correlation',
    ),
    ('large.npz', 'large.npz: fc7: the activations of 2.png are too large: their magnitudes must be'),
    ('large.npz --measure cka', 'large.npz: fc7: the activations of 2.png are too large'),
    ('uneven.h5', 'must have a row for each stimulus, but their rows are: fc7 5, fc8 4'),
    ('good.npz --ceiling', '--ceiling needs the files of at least two subjects after the first file'),
    ('good.npz good.npz --ceiling --measure cka', '--ceiling is for dissimilarities, which cka does not'),
    ('good.npz it.npz --ceiling', 'different layers: good.npz has fc7, it.npz has fc7, IT; choose by'),
    ('equal.npz --measure cka', 'equal.npz: fc7: the activations of all stimuli are the same'),
    ('short.npz', 'good.npz has 5 rows and short.npz has 4; they must be of the same stimuli'),
    (
      'others.npz',
      'the stimuli differ: only good.npz has 2.png, 3.png, 4.png; only others.npz has x.png, y.png, z\\n.png',
    ),
    ('good.npz --measure rsa-spearmann', "unknown measure 'rsa-spearmann'; did you mean 'rsa-spearman'?"),
    ('good.npz --distance cosin', "unknown distance 'cosin'; did you mean 'cosine'?"),
    ('good.npz --layers fc8', "unknown layer 'fc8'; did you mean 'fc7'?"),
    ('good.npz --measure cka --distance cosine', '--distance is for dissimilarities, which cka does not'),
    (
      'good.npz --measure cka-debiased --bootstrap 9',
      '--bootstrap is for dissimilarities, which cka-debiased',
    ),
    ('good.npz --bootstrap 0', '--bootstrap (=0) must be at least 1'),
    ('good.npz --bootstrap many', "invalid int value: 'many'"),
    ('good.npz --out f.txt', '--out f.txt: the ending must be .csv or .json'),
    ('good.npz --out nowhere/f.csv', 'cannot write nowhere/f.csv: there is no folder nowhere'),
    ('good.npz --figure f.pdf', '--figure f.pdf: the ending must be .svg or .png'),
  ],
)
def test_mistakes(bad, capsys, arguments, message):
  words = [word.replace('+', ' ') for word in arguments.split()]
  assert main(['compare', 'good.npz', *words]) == 2
  out, errors = capsys.readouterr()
  assert message in errors
  assert (out, len(errors.splitlines())) == ('', 1)


def test_too_few_stimuli(bad, capsys):
  for file, message in (
    ('one.npz', '1 stimulus is too few; 3 are'),
    ('empty_rows.npz', '0 stimuli are too few; 3 are'),
  ):
    assert main(['compare', file, file]) == 2
    assert message in capsys.readouterr().err


def test_networks_instead_of_features(bad, capsys):
  save_weights('torch.pth', SPEC, random_variables(SPEC, 5))
  batchnorm = VARIANTS['batchnorm'].scaled(1 / 16, 67)
  save_weights('keras.weights.h5', batchnorm, random_variables(batchnorm, 5))
  (bad / 'run').mkdir()
  (bad / 'run/config.json').write_text('{}', encoding='utf-8')
  for network in ('torch.pth', 'keras.weights.h5', 'torchvision', 'run', 'run@best', 'hf:ada/net'):
    assert main(['compare', 'good.npz', network]) == 2
    advice = f'write its features first: alexnet-flax features IMAGES {network} --layers relu5,fc7'
    assert capsys.readouterr().err == f'error: {network} is a network; {advice} --out FEATURES.h5\n'


def test_layers_that_a_file_lacks(bad, capsys):
  plain('it.npz', IT=np.random.default_rng(1).normal(size=(5, 3)))
  assert main(['compare', 'it.npz', 'good.npz', '--layers', 'IT']) == 2
  assert 'good.npz has none of the layers IT; it has fc7' in capsys.readouterr().err


def test_another_image_of_the_same_name(files, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(files)
  (tmp_path / 'copy').mkdir()
  network = load_pretrained(files / 'w0.safetensors')
  (files / 'x.png').write_bytes(encode(smooth_image(70, 70, 8), 'PNG'))
  write_features(network, ['e.png', 'x.png'], ['fc7'], str(tmp_path / 'a.npz'))
  (files / 'x.png').write_bytes(encode(smooth_image(70, 70, 9), 'PNG'))
  write_features(network, ['e.png', 'x.png'], ['fc7'], str(tmp_path / 'b.npz'))
  assert main(['compare', str(tmp_path / 'a.npz'), str(tmp_path / 'b.npz')]) == 2
  errors = capsys.readouterr().err
  assert errors.count('has x.png (SHA-256 ') == 2
  assert 'e.png' not in errors


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'list.txt is empty; it must name images, one a line'),
    (b'\n\r\n', 'list.txt is empty; it must name images, one a line'),
    (b'e.png\nabsent.png\n', "line 2 of list.txt: there is no file 'absent.png', neither in . nor here"),
    (b'/absent.png', "line 1 of list.txt: there is no file '/absent.png'\n"),
    (b'\x00\xff\n', 'line 1 of list.txt: there is no file'),
    (None, 'cannot read the list list.txt: No such file'),
  ],
)
def test_lists_that_name_no_images(stimuli, tmp_path, monkeypatch, capsys, content, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'e.png').write_bytes((stimuli / 'e.png').read_bytes())
  if content is not None:
    (tmp_path / 'list.txt').write_bytes(content)
  assert main(['features', '--list', 'list.txt', '--layers', 'fc7', '--out', 'f.h5']) == 2
  errors = capsys.readouterr().err
  assert message in errors
  assert len(errors.splitlines()) == 1


def test_a_list_from_here_with_windows_line_ends(files, tmp_path, monkeypatch):
  """Paths are looked for beside the list, then from here; the network may be named as for other images."""
  monkeypatch.chdir(files)
  odd = os.fsdecode(b'\xff.png')
  (files / odd).write_bytes((files / 'e.png').read_bytes())
  (tmp_path / 'list.txt').write_bytes(b'\xef\xbb\xbfe.png\r\n\r\n\xff.png\r\n')
  flags = ['--list', str(tmp_path / 'list.txt'), '--layers', 'fc7']
  assert main(['features', 'b1.png', 'w0.safetensors', *flags, '--out', str(tmp_path / 'f.h5')]) == 0
  assert main(['features', 'w0.safetensors', *flags, '--out', str(tmp_path / 'g.npz')]) == 0
  assert read_features(str(tmp_path / 'f.h5')).names == ['b1.png', 'e.png', r'\xff.png']
  assert read_features(str(tmp_path / 'g.npz')).names == ['e.png', r'\xff.png']


def test_features_of_no_images(files, capsys):
  assert main(['features', '--layers', 'fc7', '--out', str(files / 'no.h5')]) == 2
  assert 'name the images: files, folders, patterns, or --list FILE' in capsys.readouterr().err
  assert (
    main(['features', str(files / 'w0.safetensors'), '--layers', 'fc7', '--out', str(files / 'no.h5')]) == 2
  )
  assert 'is a network; name the images too' in capsys.readouterr().err
