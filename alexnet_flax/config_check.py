"""What a configuration must satisfy before any data or device is looked at."""

import dataclasses
import math
import typing
from typing import Any

from alexnet_flax import editing, guard, specs
from alexnet_flax.config import MODES, Config, all_keys, network, value_of
from alexnet_flax.data.bad_pictures import Policy
from alexnet_flax.data.views import Crop, Resize
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.geometry import check_image_size
from alexnet_flax.losses import LOSSES
from alexnet_flax.optimizers import SCHEDULES
from alexnet_flax.variants import VARIANTS


def check(config: Config) -> None:
  """Raises UsageError for unknown names, values out of range and pairs that contradict each other."""
  model, data, optimizer = config.model, config.data, config.optimizer
  names: list[tuple[str, str | None, Any]] = [
    ('model.variant', model.variant, VARIANTS),
    ('model.activation', model.activation, typing.get_args(specs.ActivationKind)),
    ('model.pooling', model.pooling, typing.get_args(specs.PoolKind)),
    ('model.dtype', model.dtype, ('float32', 'bfloat16')),
    ('data.crop', data.crop, typing.get_args(Crop)),
    ('data.resize', data.resize, typing.get_args(Resize)),
    ('data.on_bad_image', data.on_bad_image, typing.get_args(Policy)),
    ('optimizer.schedule', optimizer.schedule, SCHEDULES),
    ('loss.name', config.loss.name, LOSSES),
    ('on_nonfinite', config.on_nonfinite, typing.get_args(guard.Policy)),
    ('on_save_error', config.on_save_error, ('stop', 'continue')),
    ('transfer.mode', config.transfer.mode, MODES),
  ]
  for key, name, choices in names:
    if name is not None and name not in choices:
      raise unknown_name(f'value of {key}:', name, choices)

  for key in all_keys():
    value = value_of(config, key)
    if value is None or isinstance(value, bool | str | tuple):
      continue
    least, excluded = _LEAST.get(key, (0, False))
    if not math.isfinite(value):
      raise UsageError(f'{key} (={value}) must be finite')
    if value < least or (excluded and value == least):
      raise UsageError(f'{key} (={value}) must be {"more than" if excluded else "at least"} {least}')
    if key in _MOST and value > _MOST[key]:
      raise UsageError(f'{key} (={value}) must be at most {_MOST[key]}')
    if key in _BELOW_ONE and value >= 1:
      raise UsageError(f'{key} (={value}) must be less than 1')
  for key in ('data.crop_scale', 'data.crop_ratio'):
    low, high = value_of(config, key)
    if not 0 < low <= high or (key == 'data.crop_scale' and high > 1):
      raise UsageError(f'{key} (={(low, high)}) must be (least, greatest), positive, and shares at most 1')
  if not all(0 <= value <= 255 for value in data.rotation_fill):
    raise UsageError(f'data.rotation_fill (={data.rotation_fill}) must be RGB in 0 ... 255')
  if config.transfer.mode == 'linear_probe' and any(dataclasses.asdict(config.augment).values()):
    raise UsageError('a linear probe trains on features of the pictures as they are; set no augment.* for it')
  if data.batch_size % optimizer.accumulate_steps:
    raise UsageError(
      f'data.batch_size (={data.batch_size}) must be divisible by optimizer.accumulate_steps'
      f' (={optimizer.accumulate_steps})'
    )
  if optimizer.schedule == 'step' and not optimizer.boundary_epochs:
    raise UsageError("optimizer.schedule='step' needs optimizer.boundary_epochs, for example (30, 60)")
  boundaries = optimizer.boundary_epochs
  if any(b <= 0 for b in boundaries) or list(boundaries) != sorted(boundaries):
    raise UsageError(f'optimizer.boundary_epochs (={boundaries}) must be positive and ascending')
  spec = network(config)
  editing.frozen_layers(spec, editing.layer_patterns(config.transfer.freeze))
  try:
    check_image_size(spec, spec.image_size, spec.image_size)
  except ValueError as error:
    raise UsageError(f'model.image_size: {error}') from None


_LEAST: dict[str, tuple[float, bool]] = {
  'model.width': (0, True),
  'model.num_classes': (2, False),
  'data.batch_size': (1, False),
  'data.eval_batch_size': (1, False),
  'data.num_threads': (1, False),
  'data.center_crop_share': (0, True),
  'data.examples_per_class': (1, False),
  'optimizer.accumulate_steps': (1, False),
  'optimizer.clip_norm': (0, True),
  'total_epochs': (0, True),
  'total_steps': (1, False),
  'eval_every_epochs': (0, True),
  'eval_every_steps': (1, False),
  'checkpoint_every_epochs': (0, True),
  'checkpoint_every_steps': (1, False),
  'keep_checkpoints': (1, False),
  'log_every_steps': (1, False),
}
_MOST = {
  'data.center_crop_share': 1,
  'data.rotation': 180,
  'augment.brightness': 1,
  'augment.contrast': 1,
  'augment.saturation': 1,
  'augment.hue': 0.5,
  'augment.erasing': 1,
  'seed': 2**32 - 1,
}
_BELOW_ONE = (
  'model.dropout_rate',
  'model.batch_norm_momentum',
  'optimizer.momentum',
  'optimizer.ema_decay',
  'loss.label_smoothing',
)
