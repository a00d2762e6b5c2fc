"""A run's configuration: every key, its type and its default, and the checks that need no data.

Recipes (`configs/*.py`) change it by way of `config_dict.py`.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

from alexnet_flax import editing, specs
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.geometry import check_image_size
from alexnet_flax.losses import LOSSES
from alexnet_flax.optimizers import SCHEDULES
from alexnet_flax.variants import VARIANTS

MODES = ('fine_tune', 'linear_probe')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. What is None is as the variant has it; `num_classes` as the data set has it."""

  variant: str = 'batchnorm'
  width: float = 1.0
  image_size: int | None = None
  num_classes: int | None = None
  activation: str | None = None
  pooling: str | None = None
  dropout_rate: float | None = None
  batch_norm_momentum: float | None = None
  dtype: str = 'float32'


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data and their views. Batch sizes are of all devices together."""

  dataset: str = 'digits'
  data_dir: str | None = None
  train_split: str = 'train'
  eval_split: str = 'test'
  batch_size: int = 128
  eval_batch_size: int | None = None  # batch_size
  crop_scale: tuple[float, float] = (0.08, 1.0)  # shares of the picture's area
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
  flip: bool = True
  center_crop_share: float | None = None  # of the short side, in evaluation; as the variant has it
  examples_per_class: int | None = None  # so many of each class of train_split, drawn by the seed
  num_threads: int | None = None  # for decoding; one a core


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """SGD with momentum. A number of steps, where set, replaces the same duration in epochs."""

  learning_rate: float = 0.01
  schedule: str = 'cosine'
  warmup_epochs: float = 0.0
  warmup_steps: int | None = None
  boundary_epochs: tuple[float, ...] = ()  # of the schedule 'step'
  decay_factor: float = 0.1  # at each boundary
  decay_power: float = 1.0  # of the schedule 'polynomial'
  end_learning_rate: float = 0.0
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 5e-4
  clip_norm: float | None = None
  accumulate_steps: int = 1
  ema_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimised."""

  name: str = 'cross_entropy'
  label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class TransferConfig:
  """What a run starts from. Layers are named or matched: 'conv1,norm*'."""

  source: str | None = None  # a run's folder, a weights file, a URL, a published name, or 'random'
  mode: str = 'fine_tune'  # or 'linear_probe': features once, then the head alone
  layer: str | None = None  # put the head on this layer; the variant's own place if None
  new_head: bool = True
  head_stddev: float | None = None  # of the new head's normal initialisation; the variant's own if None
  freeze: str = ''
  update_frozen_statistics: bool = False  # BatchNorm of frozen layers goes on normalising by the batch
  learning_rates: str = ''  # multipliers: 'conv*:0.1,fc8:10'


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. A number of steps, where set, replaces the same duration in epochs."""

  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  transfer: TransferConfig = TransferConfig()
  seed: int = 0
  total_epochs: float = 90.0
  total_steps: int | None = None
  eval_every_epochs: float = 1.0
  eval_every_steps: int | None = None
  checkpoint_every_epochs: float = 1.0
  checkpoint_every_steps: int | None = None
  keep_checkpoints: int = 3  # the latest; the best by top-1 is kept besides
  log_every_steps: int = 50
  profile_steps: int = 0  # trace so many steps, from the tenth after the start


def all_keys(kind: type = Config, prefix: str = '') -> Iterator[str]:
  """Every key in dotted form: 'model.variant', ..."""
  for field, inner in typed_fields(kind):
    if dataclasses.is_dataclass(inner):
      yield from all_keys(typing.cast(type, inner), f'{prefix}{field}.')
    else:
      yield prefix + field


def network(config: Config) -> specs.Spec:
  """The network to train: `whole_network` with the head and the rates that the transfer asks for."""
  spec, transfer = whole_network(config), config.transfer
  if transfer.layer is not None:
    spec = editing.with_head_on(spec, transfer.layer)
  if transfer.head_stddev is not None:
    spec = editing.with_head_init(spec, specs.Normal(transfer.head_stddev))
  return editing.scale_rates(spec, learning_rate_multipliers(transfer.learning_rates))


def layer_patterns(text: str) -> list[str]:
  """The names in 'conv1,norm*'."""
  return [name for name in text.replace(' ', '').split(',') if name]


def learning_rate_multipliers(text: str) -> dict[str, float]:
  """The pairs in 'conv*:0.1,fc8:10'.

  Raises:
    UsageError: it is not written so, or a multiplier is negative.
  """
  rates = {}
  for pair in filter(None, text.replace(' ', '').split(',')):
    pattern, _, number = pair.partition(':')
    try:
      rates[pattern] = float(number)
    except ValueError:
      rates[pattern] = math.nan
    if not 0 <= rates[pattern] < math.inf:
      raise UsageError(f"transfer.learning_rates: {pair!r} must be LAYER:MULTIPLIER, as in 'conv*:0.1'")
  return rates


def whole_network(config: Config) -> specs.Spec:
  """The spec that the model's keys ask for, its input size resolved."""
  model = config.model
  spec = VARIANTS[model.variant]
  changes: list[tuple[type, str, Any]] = [
    (specs.Activation, 'kind', model.activation),
    (specs.Pool, 'kind', model.pooling),
    (specs.Dropout, 'rate', model.dropout_rate),
    (specs.BatchNorm, 'momentum', model.batch_norm_momentum),
  ]
  for kind, field, value in changes:
    if value is not None:
      spec = spec.replace(kind, **{field: value})
  share = config.data.center_crop_share
  if share is not None:
    preprocessing = dataclasses.replace(spec.preprocessing, center_crop_share=share)
    spec = dataclasses.replace(spec, preprocessing=preprocessing)
  return spec.scaled(model.width, model.image_size)


def check(config: Config) -> None:
  """Raises UsageError for unknown names, values out of range and pairs that contradict each other."""
  model, data, optimizer = config.model, config.data, config.optimizer
  names: list[tuple[str, str | None, Any]] = [
    ('model.variant', model.variant, VARIANTS),
    ('model.activation', model.activation, typing.get_args(specs.ActivationKind)),
    ('model.pooling', model.pooling, typing.get_args(specs.PoolKind)),
    ('model.dtype', model.dtype, ('float32', 'bfloat16')),
    ('optimizer.schedule', optimizer.schedule, SCHEDULES),
    ('loss.name', config.loss.name, LOSSES),
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
  editing.frozen_layers(spec, layer_patterns(config.transfer.freeze))
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
_MOST = {'data.center_crop_share': 1, 'seed': 2**32 - 1}
_BELOW_ONE = (
  'model.dropout_rate',
  'model.batch_norm_momentum',
  'optimizer.momentum',
  'optimizer.ema_decay',
  'loss.label_smoothing',
)


def typed_fields(kind: type) -> list[tuple[str, Any]]:
  """Name and type of a group's fields."""
  hints = typing.get_type_hints(kind)
  return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def value_of(config: Config, key: str) -> Any:
  """The value of a key in dotted form."""
  value: Any = config
  for part in key.split('.'):
    value = getattr(value, part)
  return value
