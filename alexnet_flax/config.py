"""A run's configuration: every key, its type and its default.

Recipes (`configs/*.py`) change it by way of `config_dict.py`; `config_check.py` says what it must satisfy.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict as ml_config_dict

from alexnet_flax import steps
from alexnet_flax.data.bad_images import Policy
from alexnet_flax.data.views import Crop, Resize
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.losses import LOSSES
from alexnet_flax.models import spec as specs
from alexnet_flax.models import surgery
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.optim import SCHEDULES

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
  crop: str = 'random_resized_crop'  # or 'random_crop': a window of the image as evaluation resizes it
  crop_scale: tuple[float, float] = (0.08, 1.0)  # shares of the image's area
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
  flip: bool = True
  rotation: float = 0.0  # degrees at most, either way
  rotation_fill: tuple[float, float, float] = (0.0, 0.0, 0.0)  # RGB of what lies outside
  resize: str = 'pil'  # in evaluation; or 'tf', without antialiasing
  ten_crop: bool = False  # in evaluation: four corners and the centre, and mirrored
  on_bad_image: str = 'error'  # or 'skip'
  center_crop_share: float | None = None  # of the short side, in evaluation; as the variant has it
  examples_per_class: int | None = None  # so many of each class of train_split, drawn by the seed
  num_threads: int | None = None  # for decoding; one a core


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """What is done to pixels in training, on the device. 0 is nothing."""

  pca_noise: float = 0.0  # standard deviation of the principal components' weights; the paper's is 0.1
  brightness: float = 0.0  # factors 1 - x ... 1 + x
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0  # turns, at most 0.5
  erasing: float = 0.0  # share of the images of which a rectangle is erased
  mixup: float = 0.0  # alpha of the Beta distribution of shares; with CutMix each takes half of the batches
  cutmix: float = 0.0


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
  augment: AugmentConfig = AugmentConfig()
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
  on_nonfinite: str = 'stop'  # at a loss or an update that is not finite; or 'skip' it
  on_save_error: str = 'stop'  # when a checkpoint cannot be written; or 'continue'
  deterministic: bool = False  # on GPUs, by slower operations; CPUs and TPUs always are
  record_examples: bool = False  # the numbers of each step's examples, in examples-PROCESS.jsonl
  report: bool = True  # report.html when the run has ended
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
    spec = surgery.with_head_on(spec, transfer.layer)
  if transfer.head_stddev is not None:
    spec = surgery.with_head_init(spec, specs.Normal(transfer.head_stddev))
  return surgery.scale_rates(spec, surgery.rate_multipliers(transfer.learning_rates))


def whole_network(config: Config) -> specs.Spec:
  """The network that the model's keys ask for, its input size resolved."""
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
    ('on_nonfinite', config.on_nonfinite, typing.get_args(steps.NonfinitePolicy)),
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
    raise UsageError('a linear probe trains on features of the images as they are; set no augment.* for it')
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
  surgery.frozen_layers(spec, surgery.layer_patterns(config.transfer.freeze))
  try:
    spec.check_image_size(spec.image_size, spec.image_size)
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


def config_dict(config: Config) -> ml_collections.ConfigDict:
  """The same as a typed ConfigDict in which every key can be overridden, those that are None too."""

  def convert(value: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for field, kind in typed_fields(type(value)):
      item = getattr(value, field)
      if dataclasses.is_dataclass(item):
        item = convert(item)
      elif item is None:
        item = ml_config_dict.placeholder(_plain_types(kind)[0])
      result[field] = item
    return result

  return convert(config)


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """The configuration in a (possibly nested) mapping, checked.

  Raises:
    UsageError: a key or name is unknown, a value has the wrong type, or values contradict another.
  """
  config = _build(Config, values, '')
  check(config)
  return config


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
  known = dict(typed_fields(kind))
  arguments = {}
  for key, value in values.items():
    if key not in known:
      raise unknown_name('configuration key', prefix + key, all_keys())
    inner = known[key]
    if dataclasses.is_dataclass(inner):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UsageError(f'{prefix}{key} (={value!r}) must be a group of keys')
      arguments[key] = _build(typing.cast(type, inner), value, f'{prefix}{key}.')
    else:
      arguments[key] = _typed(prefix + key, value, inner)
  return kind(**arguments)


def _typed(key: str, value: Any, kind: Any) -> Any:
  """The value as its field's type: whole numbers may stand for floats, lists for tuples."""
  for plain in _plain_types(kind):
    if plain is tuple and isinstance(value, tuple | list):
      if all(type(item) in (int, float) for item in value) and _right_length(value, kind):
        return tuple(map(float, value))
    elif plain is float and type(value) is int:
      return float(value)
    elif type(value) is plain:
      return value
  if value is None and types.NoneType in typing.get_args(kind):
    return None
  wanted = str(kind) if not isinstance(kind, type) else kind.__name__
  raise UsageError(f'{key} (={value!r}) must be of type {wanted}')


def _right_length(value: Any, kind: Any) -> bool:
  items = typing.get_args(kind)
  return Ellipsis in items or len(items) == len(value)


def _plain_types(kind: Any) -> list[type]:
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  return [typing.get_origin(one) or one for one in kinds if one is not types.NoneType]
