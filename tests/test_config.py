"""Configurations: one declaration a key, checked by its type and metadata; old files are still read."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, AlexNet, BatchNorm, Dropout, Pool, create_train_state, sgd, train_step
from alexnet_flax.cli.train import parse
from alexnet_flax.config import (
  Config,
  all_keys,
  base_spec,
  from_dict,
  idle_keys,
  to_dict,
  value_of,
  with_values,
)
from alexnet_flax.errors import UsageError

# As config.json of a run was written before the components' dataclasses became the configuration.
OLD = """
{"model": {"variant": "paper", "width": 1.0, "image_size": null, "num_classes": null, "activation": null,
  "pooling": null, "dropout_rate": null, "batch_norm_momentum": null, "dtype": "float32"},
 "data": {"dataset": "digits", "data_dir": null, "train_split": "train", "eval_split": "test",
  "batch_size": 128, "eval_batch_size": null,
  "crop": "random_crop", "crop_scale": [0.08, 1.0], "crop_ratio": [0.75, 1.5],
  "flip": false, "rotation": 15.0, "rotation_fill": [0.0, 1.0, 2.0], "resize": "tf", "ten_crop": true,
  "on_bad_image": "error", "center_crop_share": null, "examples_per_class": null, "num_threads": null},
 "augment": {"pca_noise": 0.1, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0,
  "erasing": 0.0, "mixup": 0.0, "cutmix": 0.2},
 "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_epochs": 0.0, "warmup_steps": null,
  "boundary_epochs": [], "decay_factor": 0.1, "decay_power": 1.0, "end_learning_rate": 0.0, "momentum": 0.9,
  "nesterov": false, "weight_decay": 0.0005, "clip_norm": null, "accumulate_steps": 1, "ema_decay": null},
 "loss": {"name": "cross_entropy", "label_smoothing": 0.0},
 "transfer": {"source": null, "mode": "fine_tune", "layer": null, "new_head": true, "head_stddev": null,
  "freeze": "", "update_frozen_statistics": false, "learning_rates": ""},
 "seed": 0, "total_epochs": 90.0, "total_steps": null, "eval_every_epochs": 1.0, "eval_every_steps": null,
 "checkpoint_every_epochs": 1.0, "checkpoint_every_steps": null, "keep_checkpoints": 3, "log_every_steps": 50,
 "on_nonfinite": "stop", "on_save_error": "stop", "deterministic": false, "record_examples": false,
 "report": true, "profile_steps": 0}
"""


def test_an_old_configuration_is_read():
  config = from_dict(json.loads(OLD))
  assert (config.data.train_view.crop, config.data.train_view.rotation_fill) == (
    'random_crop',
    (0.0, 1.0, 2.0),
  )
  assert (config.data.eval_view.resize, config.data.eval_view.ten_crop) == ('tf', True)
  assert (config.augment.pca_noise, config.augment.cutmix) == (0.1, 0.2)
  assert config.optimizer.name == 'sgd'  # a newer key
  written = json.loads(json.dumps(to_dict(config)))
  assert [written['optimizer'].pop(name) for name in ('name', 'momentum_dtype')] == ['sgd', 'float32']
  assert [written['data'].pop(name) for name in ('max_pixels', 'verify_records')] == [200_000_000, True]
  assert [written['data'].pop(name) for name in ('crop_padding', 'corruption')] == [0, 'none']
  feeds = ('num_processes', 'crop_on', 'on_device', 'mirror')
  assert [written['data'].pop(name) for name in feeds] == [0, 'host', False, None]
  assert [written.pop(name) for name in ('compilation_cache', 'mesh', 'num_seeds')] == [True, {'model': 1}, 1]
  assert written.pop('hang_seconds') == 1800.0
  assert written.pop('tracker') == 'none'
  newer = ('pool_size', 'pool_padding', 'lrn', 'batch_norm')
  assert [written['model'].pop(name) for name in newer] == [None] * 4
  assert written == json.loads(OLD)


def test_the_keys_are_the_fields_of_the_components():
  assert 'data.crop' in all_keys()
  assert not any('view' in name or 'image_size' in name for name in all_keys() if name.startswith('data.'))
  config = with_values(Config(), {'data.crop': 'random_crop', 'augment.hue': 0.25, 'seed': 3})
  assert config.data.train_view.crop == value_of(config, 'data.crop') == 'random_crop'
  assert (config.augment.hue, config.seed) == (0.25, 3)
  assert from_dict(to_dict(config)) == config


BEYOND = {'at_least': -1, 'above': 0, 'at_most': 1, 'below': 0}  # added to the limit, it is out of range


@pytest.mark.parametrize(
  ('name', 'limit'),
  [
    (name, limit)
    for name, key in all_keys().items()
    for limit in (*key.metadata, 'at_least')
    if limit in BEYOND
  ],
)
def test_every_limit_is_held(name, limit):
  key = all_keys()[name]
  bound = key.metadata.get(limit, 0)
  if limit == 'at_least' and not {int, float} & set(key.types):
    return
  value = key.types[0](bound + BEYOND[limit])
  group, _, last = name.rpartition('.')
  with pytest.raises(UsageError, match=rf'{name} \(=.*\) must be (at least|more than|at most|less than) '):
    from_dict({group: {last: value}} if group else {last: value})


@pytest.mark.parametrize('name', [name for name, key in all_keys().items() if key.choices])
def test_every_choice_is_checked(name):
  group, _, last = name.rpartition('.')
  value = f'{all_keys()[name].choices[0]}x'
  with pytest.raises(UsageError, match=f"unknown value of {name}: '{value}'; did you mean"):
    from_dict({group: {last: value}} if group else {last: value})


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (
      {'data': {'crop_scale': (0.5, 0.1)}},
      r'data\.crop_scale \(=\(0\.5, 0\.1\)\) must be \(least, greatest\)',
    ),
    (
      {'data': {'crop': 'random_crop', 'crop_padding': 300}, 'model': {'image_size': 300}},
      r"data\.crop_padding \(=300\) must be less than the view's side \(=300\)",
    ),
    ({'data': {'rotation_fill': (0, 0, 256)}}, r'data\.rotation_fill .* must be RGB in 0 \.\.\. 255'),
    ({'optimizer': {'schedule': 'step'}}, r"optimizer\.schedule='step' needs boundary_epochs"),
    ({'optimizer': {'boundary_epochs': (2, 1)}}, r'optimizer\.boundary_epochs .* ascending'),
    ({'data': 3}, r'data \(=3\) must be a group of keys'),
    (
      {'data': {'batch_sizes': 3}},
      r"unknown configuration key 'data.batch_sizes'; did you mean 'data.batch_size'",
    ),
    ({'model': {'dtype': None}}, r'model\.dtype \(=None\) must be of type'),
    ({'data': {'batch_size': '3'}}, r'data\.batch_size .* must be of type int'),
    ({'seed': float('nan')}, r'seed \(=nan\) must be of type int'),
    ({'total_epochs': float('inf')}, r'total_epochs \(=inf\) must be finite'),
    ({'total_epochs': 10**400}, r'total_epochs \(=inf\) must be finite'),
    ({'data': {'crop_scale': (10**400, 1)}}, r'data\.crop_scale \(=inf\) must be finite'),
    ({'data.batch_size': 8}, r"unknown configuration key 'data\.batch_size'"),
    ({'model': {'lrn': 1}}, r'model\.lrn \(=1\) must be of type'),
    (
      {'model': {'pool_size': 2, 'pool_padding': 2}},
      r'Pool\.padding \(=2\) must be less than kernel_size \(=2\)',
    ),
  ],
)
def test_mistakes(values, message):
  with pytest.raises(UsageError, match=message):
    from_dict(values)


# What an ablation changes, by these keys alone, and the layers that a variant must have for it.
RESPONSE_NORMS = 'LocalResponseNorm', 'SpatialResponseNorm'
ABLATIONS = {
  'activation': (('relu', 'tanh', 'elu'), ('Activation',)),
  'lrn': ((True, False), RESPONSE_NORMS),
  'batch_norm': (('before', 'after'), ('Activation',)),
  'batch_norm=none': (('none',), ('BatchNorm',)),
  'dropout_rate': ((0.0, 0.2, 0.5), ('Dropout',)),
  'pool_size': ((2, 3), ('Pool',)),
  'pool_padding': ((1, 2), ('Pool',)),
  'pooling': (('max', 'avg', 'max+avg'), ('Pool',)),
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('ablation', ABLATIONS)
def test_every_ablation_of_every_variant(variant, ablation):
  """It builds a network that computes logits; or one line says which layer the variant lacks."""
  (values, needed), key = ABLATIONS[ablation], ablation.partition('=')[0]
  if (variant, ablation) == ('cifar10_alexnet', 'pool_padding'):
    values = (0, 1)  # its windows are of 2x2
  kinds = {type(layer).__name__ for layer in VARIANTS[variant].layers}
  found = []
  for value in values:
    size = 57 if variant == 'cifar10_alexnet' else None  # windows of 2x2 leave no room for others
    changes = {'variant': variant, 'width': 1 / 16, 'image_size': size, key: value}
    config = with_values(Config(), {f'model.{name}': changed for name, changed in changes.items()})
    line = f'model.{key} (={value}) does nothing: {variant} has no {needed[0]}'
    assert idle_keys(config) == ({} if kinds & {*needed} else {f'model.{key}': line})
    found.append(base_spec(from_dict(to_dict(config))))
    side = found[-1].image_size
    model, images = AlexNet(found[-1]), jnp.zeros((1, side, side, 3))
    logits, _ = jax.eval_shape(
      functools.partial(model.init_with_output, train=False), jax.random.key(0), images
    )
    assert logits.shape == (1, found[-1].num_classes)
  assert len(set(found)) == (len(found) if kinds & {*needed} else 1)


def test_keys_that_other_keys_make_idle():
  config = with_values(Config(), {'model.batch_norm': 'none', 'model.batch_norm_momentum': 0.9})
  assert idle_keys(config) == {
    'model.batch_norm_momentum': 'model.batch_norm_momentum (=0.9) does nothing: batchnorm has no BatchNorm'
    ' with model.batch_norm=none'
  }
  assert not any(isinstance(layer, BatchNorm) for layer in base_spec(config).layers)
  added = with_values(config, {'model.variant': 'paper', 'model.batch_norm': 'after'})
  assert idle_keys(added) == {}
  assert {layer.momentum for layer in base_spec(added).layers if isinstance(layer, BatchNorm)} == {0.9}


def test_a_step_of_the_recipe_with_the_best_evidence():
  flags = ['--config.model.width=0.0625', '--config.model.image_size=67', '--config.model.num_classes=5']
  config, workdir = parse(['train.py', '--config=configs/imagenet_best.py', *flags])
  assert (workdir, config.model.variant, config.total_epochs) == (
    'runs/imagenet_best', 'ungrouped', pytest.approx(320_000 / (1_281_167 / 256))
  )  # fmt: skip
  spec = base_spec(config)
  names = [name for name, _ in spec.named_layers()]
  assert names[:5] == ['conv1', 'relu1', 'norm1', 'pool1', 'conv2']
  assert names[-4:] == ['relu7', 'norm7', 'drop7', 'fc8']
  assert {layer.kind for layer in spec.layers if isinstance(layer, Pool)} == {'max+avg'}
  assert {layer.rate for layer in spec.layers if isinstance(layer, Dropout)} == {0.2}
  assert not config.data.eval_view.ten_crop
  assert config.data.train_view.rotation == 0
  tx, decay = sgd(0.05, spec=spec), config.optimizer.ema_decay
  state = create_train_state(AlexNet(spec, 5), tx, jax.random.key(0), (67, 67, 3), decay)
  rng = np.random.default_rng(0)
  batch = {'image': rng.normal(size=(8, 67, 67, 3)), 'label': np.arange(8) % 5, 'weight': np.ones(8)}
  batch = {name: jnp.asarray(x, jnp.int32 if name == 'label' else jnp.float32) for name, x in batch.items()}
  step, losses = jax.jit(train_step), []
  for _ in range(8):
    state, metrics = step(state, batch, jax.random.key(1))
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.5 * losses[0]
