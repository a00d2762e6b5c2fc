"""Networks for other programs to run: ONNX in ONNX Runtime, StableHLO by jax.export, and model cards."""

import dataclasses
import json
from itertools import filterfalse

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

from alexnet_flax import VARIANTS, AlexNet, Spec, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.export import model_card, stablehlo
from alexnet_flax.export import onnx as onnx_graph
from alexnet_flax.export.model_card import write_card
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.models.spec import Activation, LocalResponseNorm, Pool
from alexnet_flax.pretrained import PretrainedModel, load_pretrained
from alexnet_flax.training.logger import read_metrics
from tests.helpers import digits_run, random_variables

onnx = pytest.importorskip('onnx', reason='ONNX is not installed')
onnxruntime = pytest.importorskip('onnxruntime', reason='ONNX Runtime is not installed')


def small(spec: Spec) -> Spec:
  return spec if spec.image_size < 64 else spec.scaled(1 / 16, max(spec.smallest_image_size(), 67))


def random_images(spec, count=3):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, spec.image_size, spec.image_size, 3), np.uint8)


def greatest_difference(theirs, spec, variables, images):
  head = spec.head
  (ours,) = feature_batches(AlexNet(spec, theirs.shape[1]), variables, images, [head], batch_size=len(images))
  assert np.abs(ours[head]).max() > 0.01
  return np.abs(theirs - ours[head]).max() / np.abs(ours[head]).max()


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_in_onnx_runtime(variant, tmp_path):
  spec = small(VARIANTS[variant])
  variables, images = random_variables(spec, 10), random_images(spec)
  (path,) = onnx_graph.write(tmp_path / 'net.onnx', spec, variables)
  assert greatest_difference(onnx_graph.run(path, images), spec, variables, images) < 1e-4
  one = onnx_graph.run(path, images[:1])  # the batch is free
  np.testing.assert_allclose(one, onnx_graph.run(path, images)[:1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('kind', ['tanh', 'sigmoid', 'leaky_relu', 'elu'])
@pytest.mark.parametrize('pool', [{'kind': 'avg'}, {'kind': 'max+avg', 'padding': 1, 'ceil_mode': True}])
def test_other_activations_and_pools(kind, pool, tmp_path):
  spec = small(VARIANTS['batchnorm']).replace(Activation, kind=kind).replace(Pool, **pool)
  variables, images = random_variables(spec, 4), random_images(spec)
  (path,) = onnx_graph.write(tmp_path / 'net.onnx', spec, variables, ['a', 'b', 'c', 'd'])
  assert greatest_difference(onnx_graph.run(path, images), spec, variables, images) < 1e-4
  properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
  assert json.loads(properties['class_names']) == ['a', 'b', 'c', 'd']


def test_opencv_reads_our_onnx_too(tmp_path):
  cv2 = pytest.importorskip('cv2', reason='OpenCV is not installed')
  spec = small(VARIANTS['batchnorm']).replace(Activation, kind='elu')
  spec = spec.replace(Pool, kind='max+avg', padding=1, ceil_mode=True)
  variables, images = random_variables(spec, 4), random_images(spec)
  (path,) = onnx_graph.write(tmp_path / 'net.onnx', spec, variables)
  net = cv2.dnn.readNetFromONNX(str(path))
  net.setInput(images.astype(np.float32), 'images')
  assert greatest_difference(net.forward(), spec, variables, images) < 1e-4


def test_a_window_that_onnx_has_otherwise(tmp_path):
  spec = small(VARIANTS['paper']).replace(LocalResponseNorm, size=4)
  with pytest.raises(UsageError, match='norm1: ONNX places a window of 4 channels otherwise'):
    onnx_graph.write(tmp_path / 'net.onnx', spec, random_variables(spec, 4))


def test_a_layer_that_onnx_export_lacks():
  with pytest.raises(UsageError, match='ONNX export has no layer like new1'):
    onnx_graph.Graph({}).add_layer('new1', object(), 9)


@pytest.mark.parametrize('variant', ['batchnorm', 'original_code', 'torchvision', 'max+avg'])
def test_stablehlo_takes_any_batch_and_any_weights(variant, tmp_path):
  both = VARIANTS['ungrouped'].replace(Activation, kind='elu').replace(Pool, kind='max+avg', padding=1)
  spec = small(both if variant == 'max+avg' else VARIANTS[variant])
  variables = random_variables(spec, 10)
  program, weights = stablehlo.write(tmp_path / 'net.stablehlo', spec, variables)
  exported = jax.export.deserialize(bytearray(program.read_bytes()))
  assert set(exported.platforms) == {'cpu', 'cuda', 'rocm', 'tpu'}
  for count in (1, 3, 8):
    images = random_images(spec, count)
    logits = np.asarray(exported.call(load_file(weights), images))
    assert logits.shape == (count, 10)
    assert greatest_difference(logits, spec, variables, images) < 1e-5
  others = random_variables(spec, 10, seed=1)
  save_weights(weights, spec, others)
  assert greatest_difference(stablehlo.run(program, images), spec, others, images) < 1e-5
  assert program.stat().st_size < weights.stat().st_size / 5  # the weights are not inside


@pytest.mark.parametrize('ending', ['safetensors', 'onnx', 'stablehlo', 'keras'])
def test_a_run_goes_elsewhere_with_its_card(data_dir, tmp_path, ending, capsys):
  run = digits_run(data_dir)
  assert main(['convert', str(run), str(tmp_path / f'net.{ending}')]) == 0
  said = capsys.readouterr().out
  assert 'read back, it is the same to the bit' in said or 'its logits differ by' in said
  card = (tmp_path / f'net.{ending}.md').read_text()
  top1 = [line for line in read_metrics(run) if line['name'] == 'top1' and line['split'] != 'train'][-1]
  for expected in (
    f'`net.{ending}`',
    'variant | `batchnorm`',
    'classes | 10: 0, 1, 2',
    f'top1 {100 * top1["value"]:.2f} %',
    'over 37 images at step 20',
    'split `test[:37]`, one central crop, resized bilinearly with antialiasing',
    'trained on | `digits`, split `train[:320]`, 20 steps of 16',
    '(pixel * 1/255 - mean) / std, in the order RGB; mean (0.485, 0.456, 0.406)',
  ):
    assert expected in card
  assert data_dir not in card


def test_nothing_else_is_overwritten(data_dir, tmp_path):
  (tmp_path / 'net.safetensors').write_text('precious')
  assert main(['convert', str(digits_run(data_dir)), str(tmp_path / 'net.stablehlo')]) == 0
  assert (tmp_path / 'net.safetensors').read_text() == 'precious'
  assert (tmp_path / 'net.stablehlo.safetensors').exists()


def test_the_card_of_weights_says_that_nothing_was_measured(tmp_path, capsys):
  spec = small(VARIANTS['caffe'])
  source = save_weights(tmp_path / 'ours.safetensors', spec, random_variables(spec, 10))[0]
  assert main(['convert', str(source), str(tmp_path / 'net.onnx')]) == 0
  card = (tmp_path / 'net.onnx.md').read_text()
  assert 'accuracy | not measured by this program' in card
  assert 'in the order BGR; mean (' in card
  assert str(tmp_path) not in card


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['net.onnx', '--names', 'torchvision'], '--names=torchvision: only for .safetensors'),
    (['absent/net.onnx'], 'cannot write'),
    (
      ['net.tflite'],
      'unknown ending; choose from .safetensors, ',
    ),
  ],
)
def test_mistakes(data_dir, tmp_path, arguments, message, capsys):
  name, *options = arguments
  assert main(['convert', str(digits_run(data_dir)), str(tmp_path / name), *options]) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_card_says_what_was_changed_during_the_run(data_dir, tmp_path, monkeypatch):
  history = [{'step': step, 'changes': {'optimizer.learning_rate': [0.02, 0.5]}} for step in (10, 20)]
  monkeypatch.setattr(model_card, 'read_history', lambda folder: history)
  write_card(tmp_path / 'a.md', [tmp_path / 'a.onnx'], load_pretrained(digits_run(data_dir)))
  card = (tmp_path / 'a.md').read_text()
  assert '| changed after step 10 | `optimizer.learning_rate` from `0.02` to `0.5` |' in card
  assert 'changed after step 20' not in card  # the checkpoint is from before


def test_names_are_text_in_a_card(tmp_path):
  """Neither markup, nor HTML, nor another line."""
  names = [
    '<img src=x onerror=alert(1)>',
    '](javascript:alert(1))',
    'a|b',
    '`c`',
    'two\nlines',
    '\x1b[2Jclear',
  ]
  spec = dataclasses.replace(small(VARIANTS['caffe']), source='[x](javascript:y)')
  network = PretrainedModel('weights', AlexNet(spec, 6), random_variables(spec, 6), tuple(names))
  path = tmp_path / 'a`b<script>.onnx.md'
  write_card(path, [tmp_path / 'a`b|<script>.onnx'], network)
  card = path.read_text()
  assert card.isprintable() or set(filterfalse(str.isprintable, card)) == {'\n'}
  (classes,) = (line for line in card.splitlines() if line.startswith('| classes'))
  assert r'\<img src=x onerror=alert\(1\)\>' in classes
  assert r'\]\(javascript:alert' in classes
  assert r'a\|b' in classes
  assert 'two\\\\nlines' in classes
  assert card.splitlines()[0] == r'# a\`b\<script\>.onnx'
  assert r"`a'b\|<script>.onnx`" in card
  assert r'\[x\]\(javascript:y\)' in card
