"""A run's configuration: every key, its type and its default.

Recipes (`configs/*.py`) change it by way of `config_dict.py`; `config_check.py` says what it must satisfy.
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from alexnet_flax import editing, specs
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
  crop: str = 'random_resized_crop'  # or 'random_crop': a window of the picture as evaluation resizes it
  crop_scale: tuple[float, float] = (0.08, 1.0)  # shares of the picture's area
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
  erasing: float = 0.0  # share of the pictures of which a rectangle is erased
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
    spec = editing.with_head_on(spec, transfer.layer)
  if transfer.head_stddev is not None:
    spec = editing.with_head_init(spec, specs.Normal(transfer.head_stddev))
  return editing.scale_rates(spec, editing.rate_multipliers(transfer.learning_rates))


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
