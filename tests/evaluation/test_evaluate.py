"""`alexnet-flax evaluate`: agreement with a run's log, protocols, ImageNet's variants, error messages."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import tensorflow_datasets as tfds

from alexnet_flax import VARIANTS, pretrained, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.data.source import Example
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation import calibration, imagenet, protocols, summary
from alexnet_flax.evaluation import evaluate as evaluation
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.pretrained import PretrainedModel, load_pretrained
from alexnet_flax.training.logger import read_metrics
from tests.helpers import digits_run, encode, random_variables, smooth_image


@pytest.fixture
def run(data_dir):
  return digits_run(data_dir)


def evaluated(capsys, tmp_path, *arguments):
  path = tmp_path / 'evaluation.json'
  assert main(['evaluate', *map(str, arguments), '--json', str(path)]) == 0
  return json.loads(path.read_text()), capsys.readouterr().out


def test_evaluation_agrees_with_the_log(run, data_dir, tmp_path, capsys):
  figures, table = evaluated(capsys, tmp_path, run, '--data_dir', data_dir)
  logged = {line['name']: line for line in read_metrics(run) if line['split'] != 'train'}
  assert figures['images'] == logged['top1']['images'] == 37
  for name in ('top1', 'top5', 'loss'):
    # Training evaluates with TensorFlow's resizing, which rounds some values differently.
    assert figures[name]['value'] == pytest.approx(logged[name]['value'], rel=1e-5)
    assert figures[name]['low'] < figures[name]['value'] < figures[name]['high']
  assert f'{100 * figures["top1"]["value"]:.2f} %' in table
  assert figures['classes'] == list('0123456789')
  confusion = np.zeros((10, 10))
  for row, column, count in figures['confusion']:
    confusion[row, column] = count
  assert confusion.sum() == 37
  assert np.trace(confusion) / 37 == pytest.approx(figures['top1']['value'])
  for one in figures['per_class']:
    row = confusion[int(one['class'])]
    assert row.sum() == one['images']
    assert row[int(one['class'])] / row.sum() == pytest.approx(one['top1'])


def test_json_on_the_standard_output(run, capsys):
  assert main(['evaluate', str(run), '--json', '-']) == 0  # local.json says where the data lie
  captured = capsys.readouterr()
  assert json.loads(captured.out)['images'] == 37
  assert 'top-1' in captured.err


def test_several_networks_are_averaged(run, data_dir, tmp_path, capsys):
  other = digits_run(data_dir, seed=1)
  networks = [load_pretrained(str(folder)) for folder in (run, other)]
  source = protocols.open_evaluated('digits:test[:50]', data_dir)
  each, both = _each_and_both(networks, source)
  np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-6)
  assert np.abs(each[0] - each[1]).max() > 0.01
  figures, _ = evaluated(
    capsys, tmp_path, run, other, '--dataset', 'digits:test[:50]', '--data_dir', data_dir
  )
  labels = [label for (label,) in evaluation.correct_classes(source)]
  assert figures['top1']['value'] == pytest.approx(np.mean(both.argmax(1) == labels))
  assert [one['source'] for one in figures['networks']] == ['digits-0', 'digits-1']


def _each_and_both(networks, source):
  each = [_all_probabilities([one], source, protocols.protocol_of([one])) for one in networks]
  return each, _all_probabilities(networks, source, protocols.protocol_of(networks))


def test_weights_files_of_several_variants_see_crops_of_their_own(data_dir, tmp_path, capsys):
  specs = [VARIANTS['torchvision'].scaled(1 / 16, 67), VARIANTS['cifar10_small_alexnet'].scaled(1 / 16)]
  paths = [tmp_path / 'a.pth', tmp_path / 'b.safetensors']
  for path, spec in zip(paths, specs, strict=True):
    save_weights(path, spec, random_variables(spec, 10))
  source = protocols.open_evaluated('digits:test[:20]', data_dir)
  networks = [load_pretrained(paths[0], spec=specs[0]), load_pretrained(paths[1])]
  each, both = _each_and_both(networks, source)
  np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-6)
  assert np.abs(each[0] - each[1]).max() > 0.01
  # The options are for the file that does not describe itself.
  options = ['--variant', 'torchvision', '--image_size', '67', '--dataset', 'digits:test[:20]']
  figures, table = evaluated(capsys, tmp_path, *paths, *options, '--data_dir', data_dir)
  labels = [label for (label,) in evaluation.correct_classes(source)]
  assert figures['top1']['value'] == pytest.approx(np.mean(both.argmax(1) == labels))
  assert [(one['crop_side'], one['short_side']) for one in figures['networks']] == [(67, 77), (28, 32)]
  assert figures['protocol']['crop_side'] is None
  assert '1 crop of 67x67, short side 77 and of 28x28, short side 32, resized by pil' in table


def test_a_folder_of_seeds_is_all_of_its_runs(run, data_dir, tmp_path, capsys):
  runs = tmp_path / 'seeds [1]'
  runs.mkdir()
  for seed, folder in enumerate((run, digits_run(data_dir, seed=1))):
    (runs / f'seed-{seed}').symlink_to(folder)
  assert pretrained.seed_runs(f'{runs}@best') == [f'{runs}/seed-{seed}@best' for seed in (0, 1)]
  assert pretrained.seed_runs(run) == []
  figures, _ = evaluated(capsys, tmp_path, runs)
  assert [one['source'] for one in figures['networks']] == ['seed-0', 'seed-1']
  assert figures['images'] == 37


def test_temperature_scaling(run, data_dir, tmp_path, capsys):
  common = [run, '--data_dir', data_dir, '--dataset', 'digits:test[:50%]']
  plain, _ = evaluated(capsys, tmp_path, *common)
  figures, table = evaluated(capsys, tmp_path, *common, '--calibrate', 'test[50%:]')
  network, scaling = load_pretrained(str(run)), figures.pop('temperature_scaling')
  assert figures == plain  # before scaling, and accuracy in any case
  parts = {}
  for part in ('test[:50%]', 'test[50%:]'):
    source = protocols.open_evaluated(f'digits:{part}', data_dir)
    log_probabilities = np.log(_all_probabilities([network], source, protocols.protocol_of([network])))
    parts[part] = log_probabilities, [label for (label,) in evaluation.correct_classes(source)]
  (temperature,) = scaling['temperatures']
  assert temperature == pytest.approx(calibration.fit_temperature(*map(np.array, parts['test[50%:]'])))
  rows, labels = parts['test[:50%]']
  expected = sklearn.metrics.log_loss(labels, scipy.special.softmax(rows / temperature, axis=1))
  assert scaling['loss']['value'] == pytest.approx(expected, rel=1e-5)
  assert scaling['loss']['value'] != plain['loss']['value']
  assert (scaling['fitted_on'], scaling['images']) == ('digits:test[50%:]', 182)
  assert f'at temperature {temperature:.4f}, fitted on 182 images, digits:test[50%:]' in table

  figure = tmp_path / 'reliability.svg'
  halves, _ = evaluated(capsys, tmp_path, *common, '--calibrate', 'halves', '--figure', figure)
  fits = [calibration.fit_temperature(rows[half::2], np.array(labels)[half::2]) for half in (0, 1)]
  scaling = halves['temperature_scaling']
  drawn = figure.read_text(encoding='utf-8')
  for one in (halves, scaling):
    gaps = np.subtract(one['calibration_bins']['correct'], one['calibration_bins']['confidence'])
    assert np.abs(gaps).sum() / 182 == pytest.approx(one['calibration_error'])
    assert f'calibration error {one["calibration_error"]:.2%}<' in drawn
  assert scaling['temperatures'] == pytest.approx(fits)
  swapped = np.where(np.arange(len(rows)) % 2, fits[0], fits[1])
  expected = sklearn.metrics.log_loss(labels, scipy.special.softmax(rows / swapped[:, None], axis=1))
  assert scaling['loss']['value'] == pytest.approx(expected, rel=1e-5)


def test_a_temperature_that_cannot_be_fitted_loses_no_evaluation(run, data_dir, tmp_path, capsys):
  out = tmp_path / 'figures.json'
  common = ['--dataset', 'digits:test[:1]', '--calibrate', 'halves', '--json', str(out)]
  assert main(['evaluate', str(run), '--data_dir', data_dir, *common]) == 2
  assert 'has one image; halves need two or more' in capsys.readouterr().err
  figures = json.loads(out.read_text())
  assert figures['images'] == 1
  assert 'halves need' in figures['temperature_scaling']['error']


def test_no_temperature_is_fitted_on_what_is_evaluated(run, data_dir, capsys):
  common = ['evaluate', str(run), '--data_dir', data_dir, '--dataset', 'digits:test[:50%]', '--calibrate']
  for split, message in [
    ('test', 'digits:test has 182 of the images that are evaluated, digits:test[:50%]'),
    ('digits:test[100:200]', 'digits:test[100:200] has 82 of the images'),
    ('tset', "unknown --calibrate 'tset'; did you mean 'test'"),
    ('halfs', "unknown --calibrate 'halfs'; did you mean 'halves'"),
    ('train[:1]', 'no temperature can be fitted to digits:train[:1]: none from 0.01 to 100 is best'),
  ]:
    assert main([*common, split]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
  folders = [dataclasses.replace(protocols.open_evaluated('digits:test', data_dir), folder=f) for f in 'ab']

  def named(prefix):
    return lambda numbers: [Example(b'', 0, f'{prefix}{number}') for number in numbers.tolist()]

  same, other = (dataclasses.replace(folders[1], scan=named(prefix)) for prefix in 'xy')
  first = dataclasses.replace(folders[0], scan=named('x'))
  calibration.require_other_images(first, other)
  with pytest.raises(UsageError, match='has 364 of the images'):  # of another data set, by their names
    calibration.require_other_images(first, same)


def _all_probabilities(networks, source, protocol):
  batches = evaluation._log_probabilities(networks, source, protocol, 16, 1, None)
  return np.exp(np.concatenate([log_probabilities for log_probabilities, _ in batches]))


def test_ten_crops_and_resizing_change_the_views(run, data_dir, tmp_path, capsys):
  place = ['--data_dir', data_dir]
  one, _ = evaluated(capsys, tmp_path, run, *place)
  ten, table = evaluated(capsys, tmp_path, run, *place, '--protocol', 'ten-crop')
  tf, _ = evaluated(capsys, tmp_path, run, *place, '--resize', 'tf')
  assert (one['protocol']['crops'], ten['protocol']['crops'], tf['protocol']['resize']) == (1, 10, 'tf')
  assert '10 crops of 57' in table
  assert one['loss']['value'] != ten['loss']['value']


def test_crop_sizes(tmp_path, data_dir, capsys):
  """Crops of 224 and 227 give torchvision's network the same 6x6; crops of 160 do not."""
  spec = VARIANTS['torchvision'].scaled(1 / 16)
  path = save_weights(tmp_path / 'net.safetensors', spec, random_variables(spec, 10))[0]
  common = ['--weights', path, '--dataset', 'digits:test[:8]', '--data_dir', data_dir]
  figures, _ = evaluated(capsys, tmp_path, *common, '--size', '227')
  assert figures['protocol'] == {
    'crops': 1,
    'crop_side': 227,
    'short_side': 256,
    'resize': 'pil',
    'orientation': 'upright',
    'allowed_classes': None,
  }
  assert main(['evaluate', *map(str, common), '--size', '160']) == 2
  assert 'crops of 160x160 do not fit' in capsys.readouterr().err


def imagenet_network(folder, size=67):
  spec = VARIANTS['torchvision'].scaled(1 / 16, size)
  return save_weights(folder / 'net.safetensors', spec, random_variables(spec, 1000))[0]


def prepared(name, folder, examples, split, monkeypatch):
  """Prepares a data set with TFDS's own builder, but with the given examples instead of a download."""
  builder = tfds.builder(name, data_dir=folder)
  monkeypatch.setattr(type(builder), '_split_generators', lambda self, manager: {split: enumerate(examples)})
  builder.download_and_prepare()
  monkeypatch.undo()


@pytest.fixture(scope='module')
def images():
  return [encode(smooth_image(80, 90, seed), quality=95) for seed in range(12)]


def test_predictions_are_restricted_to_classes_that_occur(tmp_path, images, monkeypatch, capsys):
  labels = [3, 500, 999, 3, 500, 999, 3, 500, 999, 3, 500, 999]
  names = tfds.builder('imagenet_a').info.features['label'].names
  examples = [
    {'image': image, 'label': names[label], 'file_name': f'{i}.jpg'}
    for i, (image, label) in enumerate(zip(images, labels, strict=True))
  ]
  prepared('imagenet_a', tmp_path, examples, 'test', monkeypatch)
  common = ['--weights', imagenet_network(tmp_path), '--data_dir', tmp_path, '--dataset']
  assert main(['evaluate', *map(str, common), 'imagenet_a']) == 2
  assert 'has 12 images here, but published results are over 7,500' in capsys.readouterr().err
  figures, table = evaluated(capsys, tmp_path, *common, 'imagenet_a', '--any_count')
  assert figures['protocol']['allowed_classes'] == 3
  assert 'restricted to 3 classes' in table
  assert figures['protocol']['orientation'] == 'stored'  # as published figures
  assert ', as stored' in table
  assert {predicted for _, predicted, _ in figures['confusion']} <= {3, 500, 999}
  assert figures['top5']['value'] == 1  # there are only three classes
  # The same classes are allowed for a part of the set.
  options = ['--any_count', '--orientation', 'upright']
  part, table = evaluated(capsys, tmp_path, *common, 'imagenet_a:test[:2]', *options)
  assert part['protocol']['orientation'] == 'upright'
  assert ', upright' in table
  assert part['images'] == 2
  assert part['protocol']['allowed_classes'] == 3


def test_only_allowed_classes_have_probability(data_dir):
  network = load_pretrained(str(digits_run(data_dir)))
  source = protocols.open_evaluated('digits:test[:9]', data_dir)
  protocol = protocols.protocol_of([network])
  unrestricted = _all_probabilities([network], source, protocol)
  restricted = _all_probabilities([network], source, dataclasses.replace(protocol, allowed=(2, 7)))
  expected = np.where(np.isin(np.arange(10), (2, 7)), unrestricted, 0)
  np.testing.assert_allclose(restricted, expected / expected.sum(1, keepdims=True), atol=1e-5)


def test_networks_with_different_heads(data_dir):
  network = load_pretrained(str(digits_run(data_dir)))
  source = protocols.open_evaluated('digits:test[:9]', data_dir)
  names = (*network.class_names, 'class 10')
  other = PretrainedModel('other', AlexNet(network.spec, 11), random_variables(network.spec, 11), names)
  protocol = protocols.protocol_of([other])
  assert len(evaluation.predict_dataset([other], source, protocol).labels) == 9  # a wider head is allowed
  with pytest.raises(UsageError, match='must have the same classes'):
    evaluation.predict_dataset([network, other], source, protocol)
  broken = PretrainedModel(
    'nan', network.model, jax.tree.map(lambda x: x * np.nan, network.variables), network.class_names
  )
  with pytest.raises(UsageError, match='nan: the predictions are not finite'):
    evaluation.predict_dataset([broken], source, protocol)


def test_real_counts_every_correct_class_and_skips_images_without(tmp_path, images, monkeypatch):
  weights = imagenet_network(tmp_path)
  network = load_pretrained(str(weights))
  names = tfds.builder('imagenet2012_real').info.features['original_label'].names
  correct = [[7], [], [7, 8]] + [[number] for number in range(9)]
  examples = [
    {
      'image': image,
      'original_label': names[5],
      'real_label': [names[label] for label in labels],
      'file_name': f'{i}.JPEG',
    }
    for i, (image, labels) in enumerate(zip(images, correct, strict=True))
  ]
  prepared('imagenet2012_real', tmp_path, examples, 'validation', monkeypatch)
  source = protocols.open_evaluated('imagenet2012_real', str(tmp_path))
  assert sorted(map(sorted, evaluation.correct_classes(source))) == sorted(map(sorted, correct))
  predictions = evaluation.predict_dataset([network], source, protocols.protocol_of([network]))
  assert len(predictions.labels) == 11
  # By hand: whether the most probable class of each labelled image is one of its labels.
  seen = _all_probabilities([network], source, protocols.protocol_of([network]))
  labels = evaluation.correct_classes(source)
  hits = [row.argmax() in some for row, some in zip(seen, labels, strict=True) if some]
  assert predictions.top_k(1).value == pytest.approx(np.mean(hits))


def test_images_without_a_label_are_not_counted(data_dir):
  network = load_pretrained(str(digits_run(data_dir)))
  source, protocol = protocols.open_evaluated('digits:test[:9]', data_dir), protocols.protocol_of([network])

  def without(hidden):
    def change(read):
      return lambda numbers: [
        example._replace(label=-1) if number in hidden else example
        for number, example in zip(numbers, read(numbers), strict=True)
      ]

    return dataclasses.replace(source, read=change(source.read), scan=change(source.scan))

  predictions = evaluation.predict_dataset([network], without({0, 4}), protocol)
  assert predictions.indices.tolist() == [1, 2, 3, 5, 6, 7, 8]
  with pytest.raises(UsageError, match='no image has a label'):
    evaluation.predict_dataset([network], without(range(9)), protocol)


def test_bad_images_are_left_out_on_request(run, tmp_path, capsys):
  for label in range(10):
    folder = tmp_path / 'test' / str(label)
    folder.mkdir(parents=True)
    (folder / 'a.jpg').write_bytes(encode(smooth_image(60, 60, label)))
  (folder / 'b.jpg').write_bytes(b'not an image')
  place = ['--dataset', 'image_folder:test', '--data_dir', tmp_path]
  assert main(['evaluate', str(run), *map(str, place)]) == 2
  assert 'repair or remove it, or set --on_bad_image=skip' in capsys.readouterr().err
  figures, table = evaluated(capsys, tmp_path, run, *place, '--on_bad_image', 'skip')
  assert (figures['images'], figures['images_skipped'], figures['images_without_label']) == (10, 1, 0)
  assert '1 images cannot be decoded and were skipped' in table


def test_imagenet_c(tmp_path, images, monkeypatch, capsys):
  monkeypatch.setattr(imagenet, 'ALEXNET_ERRORS', {'gaussian_noise': 88.6428, 'fog': 81.9324})
  names = tfds.builder('imagenet2012_corrupted/fog_1').info.features['label'].names
  errors = {name: imagenet.ALEXNET_ERRORS[name] for name in ('gaussian_noise', 'fog')}
  for number, name in enumerate(f'{one}_{severity}' for one in errors for severity in (1, 2)):
    examples = [
      {'image': image, 'label': names[number], 'file_name': f'{i}.JPEG'} for i, image in enumerate(images[:5])
    ]
    prepared(f'imagenet2012_corrupted/{name}', tmp_path, examples, 'validation', monkeypatch)
  monkeypatch.setattr(summary, 'ALEXNET_ERRORS', errors)
  monkeypatch.setattr(imagenet, 'ALEXNET_ERRORS', errors)
  monkeypatch.setattr(summary, 'SEVERITIES', (1, 2))
  weights = imagenet_network(tmp_path)
  common = ['--weights', weights, '--dataset', 'imagenet2012_corrupted', '--data_dir', tmp_path]
  assert main(['evaluate', *map(str, common)]) == 2
  assert 'has 5 images here, but published results are over 50,000' in capsys.readouterr().err
  common.append('--any_count')
  figures, table = evaluated(capsys, tmp_path, *common)
  # TFDS stores them as 224x224: they are not resized or cropped again.
  assert figures['protocol']['short_side'] == figures['protocol']['crop_side'] == 67
  means = {name: np.mean(values) for name, values in figures['errors'].items()}
  assert figures['error'] == pytest.approx(np.mean(list(means.values())))
  assert figures['mCE'] == pytest.approx(
    np.mean([means['gaussian_noise'] / 0.886428, means['fog'] / 0.819324])
  )
  assert f'mCE {100 * figures["mCE"]:.2f} %' in table
  shutil.rmtree(tmp_path / 'imagenet2012_corrupted' / 'fog_2')
  assert main(['evaluate', *map(str, common)]) == 2
  assert 'imagenet2012_corrupted/fog_2' in capsys.readouterr().err


def test_mce_of_the_published_errors_is_one():
  published = {name: [error / 100] * 5 for name, error in imagenet.ALEXNET_ERRORS.items()}
  assert imagenet.corruption_errors(published)['mCE'] == pytest.approx(1)
  assert len(published) == 15


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--protocol', '10-crop'], "unknown protocol '10-crop'; did you mean"),
    (['--dataset', 'digits:tset'], "unknown split 'tset'; did you mean 'test'"),
    (['--dataset', ':test'], 'write NAME or NAME:SPLIT'),
    (['--batch_size', '0'], '--batch_size (=0) must be at least 1'),
    (
      ['--json', '/proc/absent/a.json'],
      'cannot write /proc/absent/a.json: there is no folder /proc/absent',
    ),
    (['--json', '/tmp'], 'cannot write /tmp: it is a folder'),
    (['--size', '0'], 'crops of 0x0 do not fit'),
  ],
)
def test_error_messages(run, data_dir, arguments, message, capsys):
  assert main(['evaluate', str(run), '--data_dir', data_dir, *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


def test_a_data_set_with_other_classes(run, tmp_path, capsys):
  for label in range(10):
    folder = tmp_path / 'test' / f'animal {label}'
    folder.mkdir(parents=True)
    (folder / 'a.jpg').write_bytes(encode(smooth_image(60, 60, label)))
  place = ['--dataset', 'image_folder:test', '--data_dir', str(tmp_path)]
  assert main(['evaluate', str(run), *place]) == 2
  assert 'other classes than' in capsys.readouterr().err
  shutil.rmtree(tmp_path / 'test' / 'animal 3')
  assert main(['evaluate', str(run), *place]) == 2
  assert 'has 9 classes, but' in capsys.readouterr().err


def test_folders_that_are_not_runs(tmp_path, run, capsys):
  assert main(['evaluate', str(tmp_path)]) == 2
  assert "is not a run's folder" in capsys.readouterr().err
  shutil.copy(run / 'config.json', tmp_path)
  assert main(['evaluate', str(tmp_path)]) == 2
  assert 'no checkpoint in' in capsys.readouterr().err
  assert main(['evaluate']) == 2
  assert 'name what to evaluate' in capsys.readouterr().err
  assert main(['evaluate', '--weights', 'x.safetensors']) == 2
  assert 'there is no such network' in capsys.readouterr().err
