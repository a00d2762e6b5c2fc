"""`report.html`: the contents of the page, that it is self-contained, and several runs side by side."""

import dataclasses
import io
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_flax.cli.main import main
from alexnet_flax.cli.train import train_and_report
from alexnet_flax.data.augment import normalize
from alexnet_flax.data.source import Example, Source
from alexnet_flax.data.views import EvalView
from alexnet_flax.evaluation.scores import Estimate
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.training import train as training
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.viz import report
from alexnet_flax.viz.charts import Series, line_chart
from alexnet_flax.viz.figures import channel_tiles, filter_tiles, first_kernel, page_template, tiles
from alexnet_flax.viz.report import content, load_results, write_report
from tests.helpers import TINY, digits_run, random_variables, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def run(data_dir):
  return digits_run(data_dir)


@pytest.fixture(scope='module')
def results(data_dir):
  """The run with its predictions, which are computed once."""
  return load_results(str(digits_run(data_dir)), data_dir)


@pytest.fixture
def page(run):
  """The page that was written at the end of training."""
  return (run / 'report.html').read_text()


def test_a_finished_run_has_a_report(run, page):
  lines = [line for line in read_metrics(run) if line['split'] != 'train']
  top1 = [line['value'] for line in lines if line['name'] == 'top1'][-1]
  assert f'<b>{100 * top1:.2f} %</b>' in page
  loss = [line['value'] for line in lines if line['name'] == 'loss'][-1]
  shown = re.search(r'<b>([\d.]+)</b><span>loss', page)
  assert float(shown[1]) == pytest.approx(loss, rel=2e-3)  # resized by Pillow here, by TensorFlow in training
  for section in (
    'Curves', 'First filters', 'Predictions', 'Nearest neighbours', 'Confusion matrix', 'Layers',
    'Speed and versions', 'Configuration',
  ):  # fmt: skip
    assert section in page
  assert page.count('<svg') == 5
  assert page.count('class="neighbours"') == 5
  assert '6 filters of 11x11x3' in page


def test_the_page_is_self_contained(page):
  assert not re.search(r'(src|href)="(?!data:|#)', page)
  assert 'http' not in re.sub(r'xmlns(:\w+)?="[^"]*"', '', page).replace('http-equiv', '')
  assert '<script' not in page
  assert len(page) < 3_000_000


def test_the_page_does_not_contain_the_users_folders(page, data_dir):
  assert data_dir not in page
  assert '/home/' not in page
  assert '/tmp/' not in page


def test_the_environment_is_recorded(run, page):
  found = json.loads((run / 'environment.json').read_text())
  assert set(found) == {'command', 'commit', 'devices', 'platform', 'versions'}
  assert found['versions']['jax'] in page
  assert found['devices'] == '8 x cpu'


def test_the_command_writes_the_same_page(run, page, tmp_path, capsys):
  out = tmp_path / 'again.html'
  assert main(['report', str(run), '--out', str(out)]) == 0  # local.json says where the data lie
  assert capsys.readouterr().out == f'wrote {out}\n'
  assert _without_pixels(out.read_text()) == _without_pixels(page)


def _without_pixels(text):
  return re.sub(r'base64,[^"]*', '', text)


@pytest.fixture
def without_data(run, tmp_path):
  """A copy of the run, with a data set that does not exist."""
  shutil.copytree(run, tmp_path / 'run')
  config = json.loads((run / 'config.json').read_text())
  config['data'] |= {'dataset': 'cifar10', 'data_dir': str(tmp_path)}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  return tmp_path / 'run'


def test_without_data_the_rest_is_shown(without_data, tmp_path, capsys, monkeypatch):
  (tmp_path / 'run' / 'metrics.jsonl').unlink()
  page = (without_data / 'report.html').read_bytes()
  monkeypatch.delattr(report, 'content')  # nothing is computed first
  assert main(['report', str(without_data)]) == 2
  assert 'report.html shows images, which this report would not; give --data_dir' in capsys.readouterr().err
  assert (without_data / 'report.html').read_bytes() == page
  monkeypatch.undo()
  (without_data / 'report.html').unlink()
  assert main(['report', str(without_data)]) == 0
  assert 'give --data_dir' in capsys.readouterr().err
  text = (tmp_path / 'run' / 'report.html').read_text()
  assert 'The data set is not available' in text
  assert 'Nothing was logged' in text
  assert 'First filters' in text


def test_several_runs_side_by_side(run, data_dir, tmp_path, capsys):
  other, out = digits_run(data_dir, seed=1), tmp_path / 'both.html'
  assert main(['report', str(run), str(other), '--data_dir', data_dir, '--out', str(out)]) == 0
  text = out.read_text()
  assert 'Side by side' in text
  assert text.count('<section') == 2
  assert text.count('<svg') == 12
  differing = text[text.index('Differences of the configurations') : text.index('<section')]
  keys = re.findall(r'<tr><td><code>([a-z_.]+)</code></td>', differing)
  assert keys == ['seed', 'report']


def test_runs_with_the_same_folder_name(without_data, tmp_path, monkeypatch):
  for parent in 'ab':
    shutil.copytree(without_data, tmp_path / parent / 'digits')
  monkeypatch.chdir(tmp_path)
  assert main(['report', str(tmp_path / 'a' / 'digits'), 'b/digits']) == 0
  text = (tmp_path / 'report.html').read_text()
  assert '<title>a/digits · b/digits' in text
  for name in ('a/digits', 'b/digits'):
    assert text.count(name) >= 4  # the title, two legends, and the run's heading
  assert f'{tmp_path}/a' not in text


@pytest.mark.parametrize('folder', ['', 'absent'])
def test_folders_that_are_not_runs(tmp_path, folder, capsys):
  assert main(['report', str(tmp_path / folder)]) == 2
  assert "is not a run's folder" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(without_data, capsys):
  assert main(['report', str(without_data), '--out', '/proc/version/a.html']) == 2
  assert 'cannot write /proc/version/a.html' in capsys.readouterr().err


def test_a_failed_report_does_not_fail_the_run(without_data, monkeypatch, capsys):
  (without_data / 'report.html').unlink()
  (without_data / 'report.html').mkdir()
  monkeypatch.setattr(training, 'train', lambda config, workdir: None)  # the run is already trained
  train_and_report(replace(TINY, report=True), str(without_data))
  assert 'warning: no report: cannot write' in capsys.readouterr().out


def test_a_run_of_another_machine(without_data, capsys):
  (without_data / 'local.json').unlink()
  (without_data / 'report.html').unlink()
  config = (without_data / 'config.json').read_text().replace(str(without_data.parent), '.../pets')
  (without_data / 'config.json').write_text(config)
  assert main(['report', str(without_data)]) == 0
  assert 'lay in a folder .../pets of another machine; give --data_dir' in capsys.readouterr().err


def test_what_changed_during_the_run_is_shown(results, tmp_path):
  history = [{'step': 6, 'changes': {'optimizer.learning_rate': [0.02, 0.5]}}]
  changed = dataclasses.replace(results, history=history)
  vars(changed)['predictions'] = results.predictions  # cached
  write_report([changed], tmp_path / 'a.html')
  row = ('7', '<code>optimizer.learning_rate</code>', '<code>0.02</code>', '<code>0.5</code>')
  assert f'<tr><td>{"</td><td>".join(row)}</td></tr>' in (tmp_path / 'a.html').read_text()


def test_class_names_are_escaped(results, tmp_path):
  names = ('<script>alert(1)</script>', 'a\x1b[2J\nb', 'raw \udcff', '名') + (
    '<script>alert(1)</script>',
  ) * 6
  network = dataclasses.replace(results.network, class_names=names)
  renamed = dataclasses.replace(results, network=network, name='名\n\udcff')
  vars(renamed)['predictions'] = results.predictions  # cached
  write_report([renamed, renamed], tmp_path / 'a.html')
  text = (tmp_path / 'a.html').read_text()
  assert '&lt;script&gt;alert(1)' in text
  assert '<script>' not in text
  assert r'a\x1b[2J\nb' in text
  assert r'raw \udcff' in text
  assert r'名\n\udcff' in text


def test_neighbours_are_nearest_in_the_last_hidden_layer(results, monkeypatch):
  monkeypatch.setattr(report, '_GALLERY', 40)
  rng = np.random.default_rng(0)
  chosen, gallery = (
    np.sort(rng.choice(total, count, replace=False)) for total, count in ((37, 5), (320, 40))
  )
  rows, layer, count = report._neighbours(results, *results.sources, np.random.default_rng(0)).values()
  assert layer == 'relu7'
  assert count == 40
  network = results.network

  @jax.jit
  def hidden(images):
    images = normalize({'image': images}, preprocessing=network.spec.preprocessing)['image']
    return network.model.apply(network.variables, images, train=False, endpoints=True)[1][layer]

  ours = np.asarray(hidden(results.views(results.sources[1], chosen)[1]))
  theirs = np.asarray(hidden(results.views(results.sources[0], gallery)[1]))
  for (_, neighbours), query in zip(rows, ours, strict=True):
    nearest = np.argsort(((theirs - query) ** 2).sum(1), kind='stable')[:6]
    labels = [example.label for example in results.sources[0].read(gallery[nearest])]
    assert [name for _, name in neighbours] == [str(label) for label in labels]


def test_the_worst_errors_come_first(results):
  shown = content(results)['evaluation']
  mistakes = shown['mistakes']
  assert mistakes
  assert len(mistakes) == min(8, (~results.predictions.hits[:, 0]).sum())
  worst = [{name: share for name, share, _ in one['predictions']}.get(one['label'], 0) for one in mistakes]
  assert worst == sorted(worst)
  assert not any(one['predictions'][0][2] for one in mistakes)
  assert len(shown['panel']) == 8
  layers = {layer.name: layer for layer in shown['layers']}
  assert layers['conv1'].shape == (15, 15, 6)
  assert layers['conv1'].parameters == 11 * 11 * 3 * 6 + 6
  assert layers['relu1'].zeros > 0


def test_filters_are_drawn_in_rgb():
  kernel = np.zeros((2, 2, 3, 4), np.float32)
  kernel[..., 0, 0] = 2  # red
  kernel[..., 2, 1] = -0.5  # the opposite of blue
  sheet = filter_tiles(kernel)
  assert sheet[1, 1].tolist() == [255, 128, 128]
  assert sheet[1, 4].tolist() == [128, 128, 0]
  spec = VARIANTS['caffe'].scaled(1 / 16, 67)
  params = random_variables(spec)['params']
  np.testing.assert_array_equal(first_kernel(spec, params), params['conv1']['kernel'][:, :, ::-1])


def test_tiles_contain_every_image_once():
  sheet = tiles(np.stack([np.full((3, 2, 3), value, np.uint8) for value in range(1, 8)]))
  counts = {value: int((sheet[..., 0] == value).sum()) for value in range(1, 8)}
  assert set(counts.values()) == {6}
  assert channel_tiles(np.arange(10.0)).shape == (6, 6, 3)
  assert channel_tiles(np.random.default_rng(0).normal(size=(4, 4, 100))).max() == 255


def test_one_value_does_not_flatten_a_curve():
  steps = list(range(20))
  spike = line_chart([Series('a', steps, [674.0, *[2 - 0.05 * x for x in steps[1:]]], 0)], 'epoch', 'loss')
  assert all(f'>{value}<' in spike for value in (1, 2, 500))  # a logarithmic axis
  smooth = line_chart([Series('a', steps, [2 - 0.05 * x for x in steps], 0)], 'epoch', 'loss')
  assert '>500<' not in smooth


@pytest.mark.parametrize('classes', [2, 6])
def test_no_top5_where_there_are_too_few_classes(results, tmp_path, classes):
  """Of two classes, all are among five. By chance one is right in two."""
  network = dataclasses.replace(results.network, class_names=tuple('abcdef'[:classes]))
  section = {'top1': (0.5, 0.4, 0.6), 'top5': (1.0, 0.9, 1.0), 'loss': (0.7, 0.6, 0.8)}
  section = {name: Estimate(*values) for name, values in section.items()}
  section |= {'images': 9, 'calibration_error': 0.1, 'loss_of_chance': np.log(classes), 'gallery': 1}
  section |= dict.fromkeys(('panel', 'mistakes', 'neighbours', 'confused', 'layers'), ())
  section |= dict.fromkeys(('protocol', 'neighbours_layer', 'confusion', 'layers_over'), '')
  few = dataclasses.replace(results, network=network, sources=None)
  page = page_template('report.html').render(
    title='', comparison=None, runs=[content(few) | {'results': results, 'evaluation': section}]
  )
  assert ('top-5' in page) == ('Top-5 accuracy' in page) == (classes > 5)
  assert f'by chance {100 / classes:.2f} %' in page
  assert f'ln {classes} = {np.log(classes):.4f}' in page


def test_run_names_are_not_parsed_as_math():
  names = ['$x$y', '_hidden', 'cost$^$']
  svg = line_chart([Series(name, [0, 1], [1, 2], 0) for name in names], 'epoch', 'loss')
  assert all(f'>{name}<' in svg for name in names)


def test_charts_use_the_colours_of_the_page():
  svg = line_chart([Series('a', [0, 1], [1, 2], 0), Series('b <', [0, 1], [2, 1], 1)], 'epoch', 'loss')
  assert 'var(--series-0)' in svg
  assert 'var(--series-1)' in svg
  assert 'currentColor' in svg
  assert not re.search(r'(stroke|fill): #', svg)
  assert 'b &lt;' in svg


def test_images_lie_as_they_were_evaluated():
  """Those of TFDS's own sets as they are stored, all others as viewers turn them."""
  pixels = np.zeros((16, 16, 3), np.uint8)
  pixels[:8] = 255
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112] = 3  # upside down
  Image.fromarray(pixels).save(file, 'PNG', exif=exif)
  read = lambda numbers: [Example(file.getvalue(), 0, '')] * len(numbers)  # noqa: E731
  source = Source('pets', 1, ('cat',), read, read, '')
  run = types.SimpleNamespace(protocol=types.SimpleNamespace(view=EvalView(16, 16)), config=TINY)
  for is_published, expected in ((False, pixels[::-1]), (True, pixels)):
    published = dataclasses.replace(source, is_published=is_published)
    _, (view,) = report.RunResults.views(run, published, np.array([0]))
    np.testing.assert_array_equal(view, expected)
