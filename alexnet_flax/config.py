"""A run's configuration: every key, its type, its default, and what it must satisfy.

A key is a field of the dataclasses below or of the components that they hold (`TrainView`, `Augmentation`,
`OptimizerConfig`, ...), declared once. Its type gives the choices (`Literal`); its metadata give the rest:

  above, at_least, at_most, below: The range of a number. All numbers are finite and at least 0.
  choices: The names allowed, where they are those of a registry.
  flat: The keys of this component have the name of the group around it: data.crop, not data.train_view.crop.
  derived: Not a key; the trainer fills the field in.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from alexnet_flax.data.augment import Augmentation
from alexnet_flax.data.bad_images import Policy
from alexnet_flax.data.corruption import Corruption
from alexnet_flax.data.images import MAX_PIXELS
from alexnet_flax.data.views import EvalView, TrainView
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.losses import LOSSES
from alexnet_flax.models import spec as specs
from alexnet_flax.models import surgery
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.optim import OptimizerConfig
from alexnet_flax.steps import NonfinitePolicy

if typing.TYPE_CHECKING:
  import ml_collections


def _field(default: Any, **metadata: Any) -> Any:
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. None leaves a value to the variant; `num_classes` to the data set."""

  variant: str = _field('batchnorm', choices=VARIANTS)
  width: float = _field(1.0, above=0)
  image_size: int | None = None
  num_classes: int | None = _field(None, at_least=2)
  activation: specs.ActivationKind | None = None
  pooling: specs.PoolKind | None = None
  pool_size: int | None = _field(None, at_least=1)  # of the window; with strides of 2, one of 3 overlaps
  pool_padding: int | None = None  # on each side
  lrn: bool | None = None  # false leaves local response norms out
  batch_norm: surgery.BatchNormPlace | None = None  # before or after activations; see with_batch_norm
  dropout_rate: float | None = _field(None, below=1)
  batch_norm_momentum: float | None = _field(None, below=1)
  dtype: Literal['float32', 'bfloat16'] = 'float32'


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data and their views. Batch sizes are those of all devices together."""

  dataset: str = 'digits'
  data_dir: str | None = None  # also in a bucket, gs://... or s3://...
  mirror: str | None = None  # a folder for copies of the files of a data_dir in a bucket
  train_split: str = 'train'
  eval_split: str = 'test'
  batch_size: int = _field(128, at_least=1)
  eval_batch_size: int | None = _field(None, at_least=1)  # batch_size
  train_view: TrainView = dataclasses.field(default_factory=TrainView, metadata={'flat': True})
  eval_view: EvalView = dataclasses.field(default_factory=EvalView, metadata={'flat': True})
  on_bad_image: Policy = 'error'
  max_pixels: int = _field(MAX_PIXELS, at_least=1)  # images with more are bad ones
  verify_records: bool = True  # compare the checksums of TFRecord files
  center_crop_share: float | None = _field(None, above=0, at_most=1)  # of the short side, in evaluation
  examples_per_class: int | None = _field(None, at_least=1)  # of train_split, drawn by the seed
  corruption: Corruption = 'none'  # of labels or pixels (Zhang et al. 2017), by the seed
  num_threads: int | None = _field(None, at_least=1)  # for decoding; one per core
  num_processes: int = 0  # that decode, each in one thread; 0: threads of the run itself
  crop_on: Literal['host', 'device'] = 'host'  # device: of raw images of one size
  on_device: bool = False  # all images to train on, of one size, on the devices


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The loss to minimise."""

  name: str = _field('cross_entropy', choices=LOSSES)
  label_smoothing: float = _field(0.0, below=1)


@dataclasses.dataclass(frozen=True)
class TransferConfig:
  """Transfer learning. Layers are given by name or pattern: 'conv1,norm*'."""

  source: str | None = (
    None  # a run's folder, a weights file, a URL, a published name, hf:OWNER/NAME, or 'random'
  )
  mode: Literal['fine_tune', 'linear_probe'] = 'fine_tune'  # linear_probe: features once, then the head alone
  layer: str | None = None  # put the head on this layer; the variant's own place if None
  new_head: bool = True
  head_stddev: float | None = None  # of the new head's normal initialisation; the variant's own if None
  freeze: str = ''
  update_frozen_statistics: bool = False  # BatchNorm of frozen layers goes on normalising by the batch
  learning_rates: str = ''  # multipliers: 'conv*:0.1,fc8:10'


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices divide the work. The batch is divided over all of them."""

  model: int = _field(1, at_least=1)  # devices that share the fully connected layers (Krizhevsky 2014)


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run. A number of steps, where set, replaces the same duration in epochs."""

  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  augment: Augmentation = dataclasses.field(default_factory=Augmentation)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  loss: LossConfig = LossConfig()
  transfer: TransferConfig = TransferConfig()
  mesh: MeshConfig = MeshConfig()
  seed: int = _field(0, at_most=2**32 - 1)
  num_seeds: int = _field(1, at_least=1)  # from `seed` on, each a run in seed-SEED, trained by one program
  total_epochs: float = _field(90.0, above=0)
  total_steps: int | None = _field(None, at_least=1)
  eval_every_epochs: float = _field(1.0, above=0)
  eval_every_steps: int | None = _field(None, at_least=1)
  checkpoint_every_epochs: float = _field(1.0, above=0)
  checkpoint_every_steps: int | None = _field(None, at_least=1)
  keep_checkpoints: int = _field(3, at_least=1)  # the latest; the best by top-1 is kept besides
  log_every_steps: int = _field(50, at_least=1)
  on_nonfinite: NonfinitePolicy = 'stop'  # at a loss or an update that is not finite
  hang_seconds: float = 1800.0  # without a step or a batch, after which the run ends with 75; 0: never
  on_save_error: Literal['stop', 'continue'] = 'stop'  # when a checkpoint cannot be written
  compilation_cache: bool = True  # in the user's cache folder: a second start compiles nothing
  deterministic: bool = False  # by slower operations on GPUs, by one thread on CPUs; TPUs always are
  record_examples: bool = False  # the indices of each step's examples, in examples-PROCESS.jsonl
  report: bool = True  # report.html when the run has ended
  tracker: Literal['none', 'trackio', 'wandb', 'mlflow', 'aim'] = 'none'  # beside TensorBoard
  profile_steps: int = 0  # trace so many steps, from the tenth after the start


class Key(typing.NamedTuple):
  """A configuration key."""

  name: str  # 'data.crop'
  path: tuple[str, ...]  # the fields that lead to it
  kind: Any  # its type
  types: list[type]  # that its value may have, without their parameters; a `Literal` counts as str
  choices: list[str]  # the names that it may have; none if any text will do
  metadata: Mapping[str, Any]


@functools.cache
def all_keys() -> dict[str, Key]:
  """Every key by its dotted name."""

  def walk(kind: type, prefix: str, path: tuple[str, ...]) -> Iterable[Key]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
      inner = hints[field.name]
      if 'derived' in field.metadata:
        continue
      if isinstance(inner, type) and dataclasses.is_dataclass(inner):
        group = prefix if 'flat' in field.metadata else f'{prefix}{field.name}.'
        yield from walk(inner, group, (*path, field.name))
      else:
        is_union = typing.get_origin(inner) in (types.UnionType, typing.Union)  # Union: of a Literal and None
        members = typing.get_args(inner) if is_union else (inner,)
        literals = [one for one in members if typing.get_origin(one) is Literal]
        plain = [str if one in literals else typing.get_origin(one) or one for one in members]
        names = [name for one in literals for name in typing.get_args(one)]
        names = names or list(field.metadata.get('choices', ()))
        yield Key(prefix + field.name, (*path, field.name), inner, plain, names, field.metadata)

  return {key.name: key for key in walk(Config, '', ())}


def value_of(config: Config, name: str) -> Any:
  """Returns the value of a key."""
  return functools.reduce(getattr, all_keys()[name].path, config)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
  """Returns the configuration with other values of some keys, unchecked: {'data.batch_size': 8}."""

  def replaced(part: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    fields: dict[str, Any] = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
      inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
      fields[name] = replaced(getattr(part, name), inner)
    return dataclasses.replace(part, **fields)

  return replaced(config, {all_keys()[name].path: value for name, value in values.items()})


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the configuration as nested dictionaries, as config.json holds it."""
  return traverse_util.unflatten_dict({name: value_of(config, name) for name in all_keys()}, sep='.')


def config_dict(config: Config) -> 'ml_collections.ConfigDict':
  """Returns a typed `ConfigDict` in which flags can override every key, those that are None too."""
  from ml_collections import ConfigDict

  tree = ConfigDict(to_dict(config))
  leave_open(tree, *(name for name in all_keys() if value_of(config, name) is None))
  return tree


def leave_open(tree: 'ml_collections.ConfigDict', *names: str) -> None:
  """Makes keys of a `config_dict` None, for a recipe's `complete` to fill in: 'data.batch_size', ..."""
  from ml_collections import config_dict as ml_config_dict

  types = {name: all_keys()[name].types[0] for name in names}
  tree.update_from_flattened_dict({name: ml_config_dict.placeholder(kind) for name, kind in types.items()})


def fill_in(tree: 'ml_collections.ConfigDict', values: Mapping[str, Any]) -> None:
  """Sets those keys that are None: {'data.batch_size': 32}."""
  for name, value in values.items():
    *groups, last = name.split('.')
    group = functools.reduce(getattr, groups, tree)
    if group[last] is None:
      group[last] = value


def from_dict(values: Mapping[str, Any]) -> Config:
  """Returns the configuration in nested dictionaries, checked; keys that are absent have their defaults.

  Raises UsageError if a key or name is unknown, a value has the wrong type or lies out of range, or two
  values contradict each other.
  """
  groups = {name.rpartition('.')[0] for name in all_keys()} - {''}
  for name in values:
    if '.' in name:
      raise unknown_name('configuration key', name, [key for key in all_keys() if '.' not in key])
  config = with_values(
    Config(), {name: _checked(name, value) for name, value in values.items() if name not in groups}
  )
  for group in sorted(groups & values.keys()):
    if not isinstance(values[group], Mapping):
      raise UsageError(f'{group} (={values[group]!r}) must be a group of keys')
    inner = {f'{group}.{name}': value for name, value in values[group].items()}
    try:
      config = with_values(config, {name: _checked(name, value) for name, value in inner.items()})
    except ValueError as error:  # of a component, which knows its fields' names alone
      raise UsageError(f'{group}.{error}') from None
  _check_pairs(config)
  return config


_LIMITS = (
  ('above', 'more than', operator.gt),
  ('at_least', 'at least', operator.ge),
  ('at_most', 'at most', operator.le),
  ('below', 'less than', operator.lt),
)


def _checked(name: str, value: Any) -> Any:
  """Returns the value in its field's type: whole numbers may stand for floats, lists for tuples."""
  if name not in all_keys():
    raise unknown_name('configuration key', name, all_keys())
  key = all_keys()[name]
  try:
    typed = _typed(key, value)
  except OverflowError:  # a whole number that no float can be
    typed = math.inf
  if isinstance(typed, str) and key.choices and typed not in key.choices:
    raise unknown_name(f'value of {name}:', typed, key.choices)
  if isinstance(typed, float | tuple) and not np.all(np.isfinite(typed)):
    raise UsageError(f'{name} (={typed}) must be finite')
  if type(typed) in (int, float):
    limits = {'at_least': 0, **key.metadata}
    for limit, words, holds in _LIMITS:
      if limit in limits and not holds(typed, limits[limit]):
        raise UsageError(f'{name} (={typed}) must be {words} {limits[limit]}')
  return typed


def _typed(key: Key, value: Any) -> Any:
  for plain in key.types:
    if plain is tuple and isinstance(value, tuple | list):
      items = typing.get_args(key.kind)
      if all(type(item) in (int, float) for item in value) and (... in items or len(items) == len(value)):
        return tuple(map(float, value))
    elif plain is float and type(value) is int:
      return float(value)
    elif type(value) is plain:
      return value
  wanted = key.kind.__name__ if isinstance(key.kind, type) else str(key.kind)
  raise UsageError(f'{key.name} (={value!r}) must be of type {wanted}')


def _check_pairs(config: Config) -> None:
  data, optimizer, transfer = config.data, config.optimizer, config.transfer
  if transfer.mode == 'linear_probe' and config.augment.is_on:
    raise UsageError('a linear probe trains on features of unaugmented images; set no augment.* for it')
  if data.batch_size % (parts := optimizer.accumulate_steps):
    by = f'optimizer.accumulate_steps (={parts})'
    raise UsageError(f'data.batch_size (={data.batch_size}) must be divisible by {by}')
  if config.num_seeds > 1 and config.seed + config.num_seeds > 2**32:
    raise UsageError(f'num_seeds (={config.num_seeds}) from seed={config.seed} on go beyond {2**32 - 1}')
  spec = build_spec(config)
  surgery.frozen_layers(spec, surgery.layer_patterns(transfer.freeze))
  if (padding := data.train_view.crop_padding) >= spec.image_size:
    raise UsageError(f"data.crop_padding (={padding}) must be less than the view's side (={spec.image_size})")
  try:
    spec.check_image_size(spec.image_size, spec.image_size)
  except ValueError as error:
    raise UsageError(f'model.image_size: {error}') from None


def build_spec(config: Config) -> specs.Spec:
  """Returns the network to train: `base_spec` with the transfer's head and learning rates."""
  spec, transfer = base_spec(config), config.transfer
  if transfer.layer is not None:
    spec = surgery.with_head_on(spec, transfer.layer)
  if transfer.head_stddev is not None:
    spec = surgery.with_head_init(spec, specs.Normal(transfer.head_stddev))
  return surgery.scale_rates(spec, surgery.rate_multipliers(transfer.learning_rates))


def base_spec(config: Config) -> specs.Spec:
  """Returns the network of the model's keys, its input size resolved."""
  model = config.model
  spec = with_norms(model)
  for key, (kind, field) in _LAYER_KEYS.items():
    if value_of(config, key) is not None and key not in idle_keys(config):
      spec = spec.replace(kind, **{field: value_of(config, key)})
  share = config.data.center_crop_share
  if share is not None:
    preprocessing = dataclasses.replace(spec.preprocessing, center_crop_share=share)
    spec = dataclasses.replace(spec, preprocessing=preprocessing)
  return spec.scaled(model.width, model.image_size)


def with_norms(model: ModelConfig) -> specs.Spec:
  """Returns the variant with the norms that the keys `lrn` and `batch_norm` say."""
  spec = VARIANTS[model.variant]
  if model.lrn is False:
    spec = surgery.without_response_norms(spec)
  return spec if model.batch_norm is None else surgery.with_batch_norm(spec, model.batch_norm)


_LAYER_KEYS: dict[str, tuple[type, str]] = {
  'model.activation': (specs.Activation, 'kind'),
  'model.pooling': (specs.Pool, 'kind'),
  'model.pool_size': (specs.Pool, 'kernel_size'),
  'model.pool_padding': (specs.Pool, 'padding'),
  'model.dropout_rate': (specs.Dropout, 'rate'),
  'model.batch_norm_momentum': (specs.BatchNorm, 'momentum'),
}


# Keys that count only where another one has a certain value.
_ONLY_WITH = {
  'optimizer.boundary_epochs': ('optimizer.schedule', ('step',)),
  'optimizer.decay_factor': ('optimizer.schedule', ('step',)),
  'optimizer.decay_power': ('optimizer.schedule', ('polynomial',)),
  'optimizer.end_learning_rate': ('optimizer.schedule', ('cosine', 'polynomial')),
  'data.crop_scale': ('data.crop', ('random_resized_crop',)),
  'data.crop_ratio': ('data.crop', ('random_resized_crop',)),
  'data.crop_padding': ('data.crop', ('random_crop',)),
}


def idle_keys(config: Config) -> dict[str, str]:
  """Returns the keys whose value has no effect, each with a line that says why.

  The variant has no such layer, or another key says that something else is done.
  """
  variant, found = config.model.variant, {}
  for key, (other, values) in _ONLY_WITH.items():
    value, there = value_of(config, key), value_of(config, other)
    if value != value_of(Config(), key) and there not in values:
      found[key] = f'{key} (={value}) does nothing with {other}={there}'
  own, edited = VARIANTS[variant].layers, with_norms(config.model).layers
  needs: dict[str, tuple[Any, tuple[type, ...]]] = {
    key: (edited, (kind,)) for key, (kind, _) in _LAYER_KEYS.items()
  }
  needs['model.lrn'] = own, (specs.LocalResponseNorm, specs.SpatialResponseNorm)
  if config.model.batch_norm == 'none':
    needs['model.batch_norm'] = own, (specs.BatchNorm,)
  for key, (layers, kinds) in needs.items():
    value = value_of(config, key)
    if value is not None and not any(isinstance(layer, kinds) for layer in layers):
      removed = ' with model.batch_norm=none' if any(isinstance(layer, kinds) for layer in own) else ''
      found[key] = f'{key} (={value}) does nothing: {variant} has no {kinds[0].__name__}{removed}'
  return found
