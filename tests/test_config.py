"""Configurations: one declaration a key, checked by its type and metadata; old files are still read."""

import json

import pytest

from alexnet_flax.config import Config, all_keys, from_dict, to_dict, value_of, with_values
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
  assert [written.pop(name) for name in ('compilation_cache', 'mesh', 'num_seeds')] == [True, {'model': 1}, 1]
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
  ],
)
def test_mistakes(values, message):
  with pytest.raises(UsageError, match=message):
    from_dict(values)
