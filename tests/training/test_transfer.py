"""Transfer learning: which layers, what is taken over, what stays, and what a run says of it."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_flax import VARIANTS, AlexNet, create_train_state, save_weights, sgd, train_step
from alexnet_flax import config as configuration
from alexnet_flax.cli.train import main
from alexnet_flax.config import Config
from alexnet_flax.data.source import few_per_class, read_labels
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.errors import UsageError
from alexnet_flax.models.surgery import (
  frozen_layers,
  match_layers,
  rate_multipliers,
  scale_rates,
  with_head_on,
)
from alexnet_flax.optim import freeze
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.training import train
from alexnet_flax.training.experiment import build_experiment
from alexnet_flax.training.initialize import initial_state
from alexnet_flax.training.linear_probe import FeatureSet
from alexnet_flax.training.transfer import graft
from tests.helpers import random_variables, replace

SPEC = VARIANTS['batchnorm'].scaled(1 / 16, 57)


def test_layers_by_name_and_pattern():
  assert match_layers(SPEC, ['fc*', 'norm[12]']) == ['norm1', 'norm2', 'fc6', 'fc7', 'fc8']
  with pytest.raises(UsageError, match="unknown layer 'cnv1'; did you mean 'conv1'"):
    match_layers(SPEC, ['cnv1'])


def test_a_frozen_layer_takes_its_batchnorm_with_it():
  assert frozen_layers(SPEC, ['conv1', 'fc6']) == ['conv1', 'norm1', 'fc6']
  assert frozen_layers(SPEC, ['norm2']) == ['norm2']
  assert frozen_layers(VARIANTS['batchnorm_grouped'], ['conv1']) == ['norm0', 'conv1', 'norm1']


def test_rates_by_layer():
  assert rate_multipliers('conv*:0.1, fc8:10') == {'conv*': 0.1, 'fc8': 10.0}
  scaled = dict(scale_rates(VARIANTS['caffe'], {'conv*': 0.1, 'conv1': 0.5}).named_layers())
  assert scaled['conv1'].multipliers.kernel_rate == pytest.approx(0.05)
  assert scaled['conv2'].multipliers.bias_rate == pytest.approx(0.2)
  assert scaled['fc6'].multipliers.kernel_rate == 1
  for text in ('conv1', 'conv1:', 'conv1:-1', 'conv1:x', 'conv1:inf'):
    with pytest.raises(UsageError, match='must be LAYER:MULTIPLIER'):
      rate_multipliers(text)
  with pytest.raises(UsageError, match='matches no layer with parameters'):
    scale_rates(SPEC, {'relu1': 2.0})


def test_a_head_on_another_layer():
  names = [name for name, _ in with_head_on(SPEC, 'pool5').named_layers()]
  assert names[-3:] == ['pool5', 'flatten', 'fc6']
  with pytest.raises(UsageError, match="unknown layer to put a head on 'fc8'"):
    with_head_on(SPEC, 'fc8')


def test_what_is_taken_over_and_what_is_left():
  theirs, ours = random_variables(SPEC, 10), random_variables(SPEC, 3, seed=1)
  grafted = graft(ours, SPEC, theirs, SPEC)
  assert grafted.new == grafted.left_out == ('fc8',)
  for name in grafted.loaded:
    np.testing.assert_array_equal(
      jax.tree.leaves(grafted.variables['params'][name])[0], jax.tree.leaves(theirs['params'][name])[0]
    )
  np.testing.assert_array_equal(
    grafted.variables['batch_stats']['norm3']['var'], theirs['batch_stats']['norm3']['var']
  )
  np.testing.assert_array_equal(grafted.variables['params']['fc8']['kernel'], ours['params']['fc8']['kernel'])
  same = random_variables(SPEC, 10, seed=1)
  assert graft(same, SPEC, theirs, SPEC, new_head=False).new == ()
  assert graft(same, SPEC, theirs, SPEC).new == ('fc8',)


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (
      VARIANTS['batchnorm'].scaled(1 / 8, 57),
      r'params/conv1/\w+ of the weights has shape .*12',
    ),
    (VARIANTS['batchnorm'].scaled(1 / 16, 99), r'params/fc6/kernel of the weights has shape'),
    (VARIANTS['torchvision'].scaled(1 / 16, 67), 'another network .torchvision.: conv1 is'),
    (VARIANTS['caffe'].scaled(1 / 16, 67), 'the weights expect images with'),
  ],
)
def test_what_does_not_fit_is_an_error_unless_it_is_the_head(other, message):
  with pytest.raises(UsageError, match=message):
    graft(random_variables(SPEC, 3), SPEC, random_variables(other, 3), other)


def test_frozen_parameters_and_statistics_stay_to_the_bit():
  spec = with_head_on(SPEC, 'pool2')
  frozen = frozen_layers(spec, ['conv*'])
  norms = tuple(name for name in frozen if name.startswith('norm'))
  batch = {
    'image': jax.random.normal(jax.random.key(2), (8, 57, 57, 3)),
    'label': jnp.arange(8) % 3,
    'weight': jnp.ones(8),
  }
  for fixed in (norms, ()):
    model = AlexNet(spec, 3, fixed_norms=fixed)
    tx = freeze(sgd(0.1, weight_decay=0.1, clip_norm=1.0), frozen)
    state = create_train_state(model, tx, jax.random.key(0), (57, 57, 3))
    new, _ = jax.jit(train_step)(state, batch, jax.random.key(1))
    for name in state.params:
      for old, now in zip(
        jax.tree.leaves(state.params[name]), jax.tree.leaves(new.params[name]), strict=True
      ):
        assert bool((old == now).all()) == (name in frozen), name
    changed = not np.array_equal(state.batch_stats['norm1']['mean'], new.batch_stats['norm1']['mean'])
    assert changed == (not fixed)
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  whole = optax.sgd(0.1, momentum=0.9).init(state.params)
  assert size(state.opt_state) < size(whole)  # no momentum for what is frozen


def test_a_few_of_each_class(data_dir):
  source = open_dataset('digits', 'train', data_dir)
  few = few_per_class(source, 3, seed=1)
  assert few.num_examples == 30
  np.testing.assert_array_equal(np.bincount(read_labels(few)), [3] * 10)
  record = lambda s: sorted(bytes(one.image) for one in s.read(np.arange(s.num_examples)))  # noqa: E731
  assert record(few) == record(few_per_class(source, 3, seed=1))
  assert record(few) != record(few_per_class(source, 3, seed=2))
  assert set(record(few)) <= set(record(source))
  with pytest.raises(UsageError, match=r"has \d+ examples of '.'; data.examples_per_class is 1000"):
    few_per_class(source, 1000, seed=0)


@pytest.fixture(scope='module', autouse=True)
def standard_promotion():
  """optax's schedules and nn.BatchNorm mix types."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='module')
def tiny(tmp_path_factory, standard_promotion):
  """A run of a few steps on the digits, and its configuration."""
  data_dir = str(tmp_path_factory.mktemp('tfds'))
  config = replace(
    Config(),
    model={'width': 1 / 16, 'image_size': 57, 'batch_norm_momentum': 0.9},
    data={
      'data_dir': data_dir,
      'batch_size': 16,
      'eval_batch_size': 128,
      'train_split': 'train[:160]',
      'crop_scale': (0.9, 1.0),
    },
    total_steps=4,
    checkpoint_every_steps=4,
    eval_every_steps=4,
  )
  folder = tmp_path_factory.mktemp('source') / 'run'
  train.train(config, folder)
  return config, folder


def variables_of_run(folder):
  return load_pretrained(folder).variables


def test_fine_tuning_from_a_run(tiny, tmp_path, capsys):
  config, source = tiny
  transfer = configuration.TransferConfig(source=str(source), freeze='conv*', learning_rates='fc8:10')
  train.train(dataclasses.replace(config, transfer=transfer), tmp_path / 'run')
  said = capsys.readouterr().out
  for line in (
    'loaded from',
    'left out of it: fc8 (2,570 parameters)',
    'new: fc8',
    'trained: fc6, fc7, fc8',
    'frozen: conv1, norm1',
  ):
    assert line in said
  before, after = variables_of_run(source), variables_of_run(tmp_path / 'run')
  for name in ('conv1', 'conv5', 'norm5'):
    for old, new in zip(
      jax.tree.leaves(before['params'][name]), jax.tree.leaves(after['params'][name]), strict=True
    ):
      np.testing.assert_array_equal(old, new)
  np.testing.assert_array_equal(before['batch_stats']['norm2']['var'], after['batch_stats']['norm2']['var'])
  assert not np.array_equal(before['params']['fc6']['kernel'], after['params']['fc6']['kernel'])


def test_each_process_takes_its_share_of_the_features(monkeypatch):
  features = FeatureSet(np.arange(10, dtype=np.float32)[:, None], np.arange(10, dtype=np.int32))
  chosen = np.arange(6, 14)  # the last four are padding
  whole = features.batch(chosen)
  assert whole['label'].tolist() == whole['index'].tolist() == [6, 7, 8, 9, 9, 9, 9, 9]
  assert whole['weight'].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  parts = []
  for process in (0, 1):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    parts.append(features.batch(chosen))
  for name, array in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_linear_probe_trains_the_head_alone_and_resumes(tiny, tmp_path):
  config, source = tiny
  transfer = configuration.TransferConfig(source=str(source), mode='linear_probe', layer='pool5')
  data = dataclasses.replace(config.data, examples_per_class=5, train_split='train')
  probe = dataclasses.replace(
    config, transfer=transfer, data=data, optimizer=configuration.OptimizerConfig(learning_rate=0.1)
  )
  train.train(probe, tmp_path / 'run')
  values = train.train(dataclasses.replace(probe, total_steps=60, eval_every_steps=60), tmp_path / 'run')
  assert values['top1'] > 0.15
  before, after = variables_of_run(source), variables_of_run(tmp_path / 'run')
  assert set(after['params']) == {*(f'{kind}{i}' for kind in ('conv', 'norm') for i in range(1, 6)), 'fc6'}
  np.testing.assert_array_equal(before['params']['conv3']['kernel'], after['params']['conv3']['kernel'])
  again = load_pretrained(tmp_path / 'run').spec
  assert [name for name, _ in again.named_layers()][-2:] == ['flatten', 'fc6']


def test_starting_from_a_file(tiny, tmp_path, capsys):
  config, source = tiny
  loaded = load_pretrained(source)
  save_weights(tmp_path / 'a.safetensors', loaded.spec, loaded.variables)
  transfer = configuration.TransferConfig(source=str(tmp_path / 'a.safetensors'), new_head=False)
  train.train(dataclasses.replace(config, transfer=transfer), tmp_path / 'run')
  assert 'new: nothing' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('transfer', 'message'),
  [
    ({'source': 'absent.pth'}, 'transfer.source=absent.pth: absent.pth: no such file'),
    ({'source': 'configs'}, "configs is not a run's folder"),
    ({'source': 'torchvison'}, "did you mean 'torchvision'"),
  ],
)
def test_sources_that_cannot_be_used(tiny, tmp_path, transfer, message):
  config, _ = tiny
  with pytest.raises(UsageError, match=message):
    train.train(
      dataclasses.replace(config, transfer=configuration.TransferConfig(**transfer)), tmp_path / 'run'
    )


ENDINGS = ('.safetensors', '.pth', '.weights.h5', '.keras', '.caffemodel')


@pytest.mark.parametrize('variant', list(VARIANTS))
def test_every_variant_is_transferred_from_every_format(variant, data_dir, tmp_path):
  """By the flags of train.py, up to the state before the first step, which nothing compiles for."""
  spec = VARIANTS[variant].scaled(1 / 16)
  weights = random_variables(spec, 7)
  sources = []
  for ending in ENDINGS:
    with contextlib.suppress(UsageError):  # the format lacks a layer of the variant
      sources += save_weights(tmp_path / f'source{ending}', spec, weights)[:1]
  assert sources
  flags = [f'--config=configs/finetune.py:{variant}', '--config.model.width=0.0625']
  flags += [f'--config.model.image_size={spec.image_size}', f'--config.data.data_dir={data_dir}']
  checked = []

  def start(config, workdir):
    experiment = build_experiment(config)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.state)
    init = lambda: jax.device_put(zeros, experiment.steps.replicated)  # noqa: E731
    steps = dataclasses.replace(experiment.steps, init=init)
    state, _ = initial_state(dataclasses.replace(experiment, steps=steps))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype), experiment.state
    )
    expected = weights['params'] | {spec.head: zeros.params[spec.head]}
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, weights.get('batch_stats', {}))
    checked.append(config.transfer.mode)

  for source in sources:
    for mode in ('fine_tune', 'linear_probe'):
      chosen = [f'--config.transfer.source={source}', f'--config.transfer.mode={mode}']
      assert main(['train.py', *flags, *chosen], start) == 0
  assert len(checked) == 2 * len(sources)


@pytest.mark.parametrize('mode', ['fine_tune', 'linear_probe'])
def test_a_network_without_batchnorm_is_transferred(mode, data_dir, tmp_path):
  spec = VARIANTS['caffenet'].scaled(1 / 16)
  save_weights(tmp_path / 'a.safetensors', spec, random_variables(spec, 7))
  flags = f'--config.transfer.mode={mode} --config.transfer.layer=pool2 --config.model.width=0.0625'
  flags += ' --config.data.eval_split=test[:8] --config.data.train_split=train[:64] --config.report=false'
  flags += f' --config.data.data_dir={data_dir} --config.total_steps=2 --config.optimizer.warmup_epochs=0'
  source = f'--config.transfer.source={tmp_path / "a.safetensors"}'
  command = ['train.py', '--config=configs/finetune.py:caffenet', *flags.split(), source]
  command += [f'--config.model.image_size={spec.image_size}', f'--workdir={tmp_path / "run"}']
  assert main(command) == 0
