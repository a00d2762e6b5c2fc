"""`report.html`: what a run's page says, that it needs nothing else, and several runs side by side."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.data.augment import normalize
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.training import train as training
from alexnet_flax.training import workdir
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.viz import report_images
from alexnet_flax.viz.charts import Series, line_chart
from alexnet_flax.viz.figures import channel_tiles, filter_tiles, first_kernel, tiles
from alexnet_flax.viz.report import write_report
from alexnet_flax.viz.report_content import content
from alexnet_flax.viz.report_run import load_subject
from tests.helpers import TINY, digits_run, random_variables, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def run(data_dir):
  return digits_run(data_dir)


@pytest.fixture
def page(run):
  """What was written when the run ended."""
  return (run / 'report.html').read_text()


def test_a_run_that_ends_has_its_report(run, page):
  lines = [line for line in read_metrics(run) if line['split'] != 'train']
  top1 = [line['value'] for line in lines if line['name'] == 'top1'][-1]
  assert f'<b>{100 * top1:.2f} %</b>' in page
  loss = [line['value'] for line in lines if line['name'] == 'loss'][-1]
  shown = re.search(r'<b>([\d.]+)</b><span>loss', page)
  assert float(shown[1]) == pytest.approx(loss, rel=2e-3)  # resized by Pillow itself
  for section in (
    'Curves', 'First filters', 'What it sees', 'Nearest neighbours', 'Confusion', 'Layers',
    'Speed and versions', 'Configuration',
  ):  # fmt: skip
    assert section in page
  assert page.count('<svg') == 5
  assert page.count('class="neighbours"') == 5
  assert '6 filters of 11x11x3' in page


def test_nothing_is_fetched(page):
  assert not re.search(r'(src|href)="(?!data:|#)', page)
  assert 'http' not in re.sub(r'xmlns(:\w+)?="[^"]*"', '', page).replace('http-equiv', '')
  assert '<script' not in page
  assert len(page) < 3_000_000


def test_nothing_of_the_users_folders(page, data_dir):
  assert data_dir not in page
  assert '/home/' not in page
  assert '/tmp/' not in page


def test_the_environment_is_recorded(run, page):
  found = json.loads((run / 'environment.json').read_text())
  assert set(found) == {'command', 'commit', 'devices', 'platform', 'versions'}
  assert found['versions']['jax'] in page
  assert found['devices'] == '8 x cpu'


def test_the_verb_writes_the_same_page(run, page, data_dir, tmp_path, capsys):
  out = tmp_path / 'again.html'
  assert main(['report', str(run), '--data_dir', data_dir, '--out', str(out)]) == 0
  assert capsys.readouterr().out == f'wrote {out}\n'
  assert _without_pixels(out.read_text()) == _without_pixels(page)


def _without_pixels(text):
  return re.sub(r'base64,[^"]*', '', text)


@pytest.fixture
def without_data(run, tmp_path):
  """The run, as one on a data set that is not here."""
  shutil.copytree(run, tmp_path / 'run')
  config = json.loads((run / 'config.json').read_text())
  config['data'] |= {'dataset': 'cifar10', 'data_dir': str(tmp_path)}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  return tmp_path / 'run'


def test_without_its_data_the_rest_is_shown(without_data, tmp_path, capsys):
  (tmp_path / 'run' / 'metrics.jsonl').unlink()
  assert main(['report', str(without_data)]) == 0
  assert 'give --data_dir' in capsys.readouterr().err
  text = (tmp_path / 'run' / 'report.html').read_text()
  assert 'The data set is not at hand' in text
  assert 'Nothing was logged' in text
  assert 'First filters' in text


def test_several_runs_side_by_side(run, data_dir, tmp_path, capsys):
  other, out = digits_run(data_dir, seed=1), tmp_path / 'both.html'
  assert main(['report', str(run), str(other), '--data_dir', data_dir, '--out', str(out)]) == 0
  text = out.read_text()
  assert 'Side by side' in text
  assert text.count('<section') == 2
  assert text.count('<svg') == 12
  differing = text[text.index('Where the configurations differ') : text.index('<section')]
  keys = re.findall(r'<tr><td><code>([a-z_.]+)</code></td>', differing)
  assert keys == ['seed', 'report']


def test_runs_of_one_folder_name_are_told_apart(run, data_dir, tmp_path, monkeypatch):
  for parent in 'ab':
    shutil.copytree(run, tmp_path / parent / 'digits')
  monkeypatch.chdir(tmp_path)
  assert main(['report', 'a/digits', 'b/digits', '--data_dir', data_dir]) == 0
  text = (tmp_path / 'report.html').read_text()
  assert '<title>a/digits · b/digits' in text
  for name in ('a/digits', 'b/digits'):
    assert text.count(name) >= 4  # the title, two legends, the run's own heading


@pytest.mark.parametrize('folder', ['', 'absent'])
def test_folders_that_are_no_runs(tmp_path, folder, capsys):
  assert main(['report', str(tmp_path / folder)]) == 2
  assert "is no run's folder" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(run, data_dir, capsys):
  assert main(['report', str(run), '--data_dir', data_dir, '--out', '/proc/version/a.html']) == 2
  assert 'cannot write /proc/version/a.html' in capsys.readouterr().err


def test_a_report_that_fails_does_not_fail_the_run(data_dir, tmp_path, monkeypatch, capsys):
  (tmp_path / 'run' / 'report.html').mkdir(parents=True)
  config = replace(TINY, data={'data_dir': data_dir}, total_steps=1, report=True)
  assert 'top1' in training.train(config, tmp_path / 'run')
  assert 'warning: no report: cannot write' in capsys.readouterr().out


def test_what_a_class_is_called_is_text(run, data_dir, tmp_path):
  subject = load_subject(str(run), data_dir)
  names = ('<script>alert(1)</script>',) * 10
  network = dataclasses.replace(subject.network, class_names=names)
  sources = subject.sources._replace(
    evaluated=dataclasses.replace(subject.sources.evaluated, class_names=names)
  )
  write_report([dataclasses.replace(subject, network=network, sources=sources)], tmp_path / 'a.html')
  text = (tmp_path / 'a.html').read_text()
  assert '&lt;script&gt;alert(1)' in text
  assert '<script>' not in text


def test_neighbours_are_the_nearest_by_the_last_hidden_layer(run, data_dir):
  subject = load_subject(str(run), data_dir)
  rows, layer, gallery = report_images._neighbours(subject, subject.sources, np.random.default_rng(0))
  assert layer == 'relu7'
  assert gallery == 320
  _, everything = subject.views(subject.sources.train, np.arange(320))
  rng = np.random.default_rng(0)
  chosen = np.sort(rng.choice(37, 5, replace=False))
  _, queries = subject.views(subject.sources.evaluated, chosen)
  network = subject.network
  ours, theirs = (
    np.asarray(
      network.model.apply(
        network.variables,
        normalize({'image': views}, preprocessing=network.spec.preprocessing)['image'],
        train=False,
        endpoints=True,
      )[1][layer]
    )
    for views in (queries, everything)
  )
  for row, query in zip(rows, ours, strict=True):
    nearest = np.argsort(((theirs - query) ** 2).sum(1), kind='stable')[:6]
    labels = [example.label for example in subject.sources.train.read(nearest)]
    assert [name for _, name in row.neighbours] == [str(label) for label in labels]


def test_the_worst_mistakes_come_first(run, data_dir):
  subject = load_subject(str(run), data_dir)
  shown = content(subject).images
  answers = subject.answers
  assert shown.mistakes
  assert len(shown.mistakes) == min(8, (~answers.hits[:, 0]).sum())
  worst = [{name: share for name, share, _ in guess.answers}.get(guess.label, 0) for guess in shown.mistakes]
  assert worst == sorted(worst)
  assert not any(guess.answers[0][2] for guess in shown.mistakes)
  assert len(shown.panel) == 8
  layers = {layer.name: layer for layer in shown.layers}
  assert layers['conv1'].shape == (15, 15, 6)
  assert layers['conv1'].parameters == 11 * 11 * 3 * 6 + 6
  assert layers['relu1'].zeros > 0


def test_filters_are_tiles_in_rgb():
  kernel = np.zeros((2, 2, 3, 4), np.float32)
  kernel[..., 0, 0] = 2  # red
  kernel[..., 2, 1] = -0.5  # the contrary of blue
  sheet = filter_tiles(kernel)
  assert sheet[1, 1].tolist() == [255, 128, 128]
  assert sheet[1, 4].tolist() == [128, 128, 0]
  spec = VARIANTS['caffe'].scaled(1 / 16, 67)
  params = random_variables(spec)['params']
  np.testing.assert_array_equal(first_kernel(spec, params), params['conv1']['kernel'][:, :, ::-1])


def test_tiles_have_every_image_once():
  sheet = tiles(np.stack([np.full((3, 2, 3), value, np.uint8) for value in range(1, 8)]))
  counts = {value: int((sheet[..., 0] == value).sum()) for value in range(1, 8)}
  assert set(counts.values()) == {6}
  assert channel_tiles(np.arange(10.0)).shape == (6, 6, 3)
  assert channel_tiles(np.random.default_rng(0).normal(size=(4, 4, 100))).max() == 255


def test_names_of_runs_are_not_mathematics():
  names = ['$x$y', '_hidden', 'cost$^$']
  svg = line_chart([Series(name, [0, 1], [1, 2], 0) for name in names], 'epoch', 'loss')
  assert all(f'>{name}<' in svg for name in names)


def test_without_git(monkeypatch, tmp_path):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert workdir.environment()['commit'] is None


def test_charts_take_the_pages_colours():
  svg = line_chart([Series('a', [0, 1], [1, 2], 0), Series('b <', [0, 1], [2, 1], 1)], 'epoch', 'loss')
  assert 'var(--series-0)' in svg
  assert 'var(--series-1)' in svg
  assert 'currentColor' in svg
  assert not re.search(r'(stroke|fill): #', svg)
  assert 'b &lt;' in svg
