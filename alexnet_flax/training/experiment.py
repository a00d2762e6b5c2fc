"""Builds data, model, optimizer and compiled steps from a configuration."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_flax import steps as step_functions
from alexnet_flax.config import Config, DataConfig, build_spec
from alexnet_flax.data.augment import augment, normalize
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.corruption import corrupted, training_examples
from alexnet_flax.data.prepare.color_pca import read_components
from alexnet_flax.data.source import Source, require_labels, require_same_classes
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import EvalView, TrainView
from alexnet_flax.errors import UsageError, install_command
from alexnet_flax.losses import LOSSES
from alexnet_flax.metrics import Metrics
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import BatchNorm, Spec
from alexnet_flax.models.surgery import frozen_layers, layer_patterns
from alexnet_flax.optim import freeze, optimizer
from alexnet_flax.steps import Batch, GuardedStep, Preprocess, TrainState
from alexnet_flax.training import linear_probe, parallel
from alexnet_flax.training.distributed import first_process_first


@dataclasses.dataclass(frozen=True)
class Data:
  """The two splits of a run and the views of their images."""

  train: Source
  evaluated: Source
  train_view: TrainView
  eval_view: EvalView
  bad: BadImages  # the policy for images that cannot be decoded, and their count
  features: tuple[linear_probe.FeatureSet, linear_probe.FeatureSet] | None = None  # for a linear probe


@dataclasses.dataclass(frozen=True)
class Learner:
  """The model and its optimizer."""

  model: AlexNet
  tx: optax.GradientTransformation
  learning_rate: optax.Schedule  # by step
  frozen: tuple[str, ...]  # the layers whose parameters stay
  preprocess: Preprocess | None  # from uint8 images to the network's input; None if trained on features


@dataclasses.dataclass(frozen=True)
class Steps:
  """The jitted functions, and the placement of their arrays."""

  init: Callable[[], TrainState]  # the state before the first step
  train: GuardedStep  # `steps.guarded(train_step)`
  evaluate: Callable[[TrainState, Batch], Metrics]
  sharding: NamedSharding  # of batches
  replicated: NamedSharding  # of metrics and flags
  state: TrainState  # the sharding of each of its leaves
  compiler_options: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When things happen, in steps (periods need not be whole)."""

  total_steps: int
  steps_per_epoch: float
  eval_period: float
  checkpoint_period: float


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A run before its first step; `state` holds shapes and types alone."""

  config: Config
  data: Data
  learner: Learner
  steps: Steps
  schedule: Schedule
  state: TrainState

  @property
  def spec(self) -> Spec:
    """The network's spec."""
    return self.learner.model.spec

  @property
  def eval_split(self) -> str:
    """The evaluated split's name in the log, where 'train' is what the training steps measured."""
    split = self.config.data.eval_split
    return 'train[:]' if split == 'train' else split


def build_experiment(config: Config, like: Experiment | None = None) -> Experiment:
  """Opens the data (preparing the embedded digits), and builds model, optimizer and steps.

  An experiment that it is `like`, which differs in its seed alone, shares its model, optimizer and steps.

  Raises UsageError if the configuration does not fit the data or the devices.
  """
  check_devices()
  with first_process_first('data'):  # it prepares the embedded digits
    train, evaluated = (
      open_dataset(
        config.data.dataset, split, config.data.data_dir, config.data.verify_records, config.data.mirror
      )
      for split in (config.data.train_split, config.data.eval_split)
    )
  require_same_classes(train, evaluated)
  require_labels(evaluated)
  return assemble(config, train, evaluated, jax.devices(), like)


def assemble(
  config: Config,
  train: Source,
  evaluated: Source,
  devices: Sequence[Any],
  like: Experiment | None = None,
) -> Experiment:
  """Builds the experiment from opened data, for these devices, which need not be of this machine.

  Raises:
    UsageError: The configuration does not fit the data or the devices.
  """
  config = _resolve(config, train, len(devices))
  train, evaluated = chosen_examples(config.data, config.seed, train, evaluated)
  steps_per_epoch = train.num_examples / config.data.batch_size
  schedule = Schedule(
    config.total_steps or max(round(config.total_epochs * steps_per_epoch), 1),
    steps_per_epoch,
    config.eval_every_steps or config.eval_every_epochs * steps_per_epoch,
    config.checkpoint_every_steps or config.checkpoint_every_epochs * steps_per_epoch,
  )
  spec = build_spec(config)
  mesh = parallel.make_mesh(devices, config.mesh.model)
  learner = like.learner if like else _learner(config, spec, schedule, train, mesh)
  size, resize_side = spec.image_size, round(spec.image_size / spec.preprocessing.center_crop_share)
  data = Data(
    train,
    evaluated,
    dataclasses.replace(config.data.train_view, image_size=size, resize_side=resize_side),
    dataclasses.replace(config.data.eval_view, image_size=size, resize_side=resize_side),
    BadImages(config.data.on_bad_image, max_pixels=config.data.max_pixels),
  )
  steps = _steps(config, learner, mesh)
  if like:
    steps = dataclasses.replace(like.steps, init=steps.init)
  config = dataclasses.replace(config, total_steps=schedule.total_steps)
  return Experiment(config, data, learner, steps, schedule, jax.eval_shape(steps.init))


def chosen_examples(data: DataConfig, seed: int, train: Source, evaluated: Source) -> tuple[Source, Source]:
  """Returns the splits as a run uses them: a few examples per class, and with other labels or pixels."""
  how = data.corruption, seed
  train = training_examples(train, data.examples_per_class, *how, data.max_pixels)
  return train, corrupted(evaluated, *how, training=False, max_pixels=data.max_pixels)


def check_devices() -> None:
  """Raises UsageError if JAX has no device of the kind that was asked for."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    asked, reason = os.environ.get('JAX_PLATFORMS', ''), ' '.join(str(error).split()) or 'there is none'
    advice = f'unset it, or {install_command("cuda")}'
    raise UsageError(f'JAX finds no device of JAX_PLATFORMS={asked}: {reason}; {advice}') from None


def compile_train_step(experiment: Experiment, like: TrainState) -> Any:
  """Compiles the training step for the shapes of the run, before there is a batch."""
  # To look into the step. There is nothing to compile then.
  if cast(Any, jax.config).jax_disable_jit:
    return experiment.steps.train
  return lower_train_step(experiment, like).compile()


def lower_train_step(experiment: Experiment, like: TrainState) -> jax.stages.Lowered:
  """Traces and lowers the training step for the shapes of the run."""
  size, count, steps = experiment.spec.image_size, experiment.config.data.batch_size, experiment.steps
  shape, dtype = (size, size, 3), jnp.uint8
  if experiment.learner.preprocess is None:
    shape, dtype = like.params[experiment.spec.head]['kernel'].shape[:1], jnp.float32
  sharded = functools.partial(jax.ShapeDtypeStruct, sharding=steps.sharding)
  batch = {
    'image': sharded((count, *shape), dtype),
    'label': sharded((count,), jnp.int32),
    'weight': sharded((count,), jnp.float32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  going = jax.ShapeDtypeStruct((), jnp.bool_, sharding=steps.replicated)
  stops = sharded((steps.sharding.mesh.size,), jnp.bool_)
  return cast(Any, steps.train).lower(like, batch, key, going, stops)


def _learner(config: Config, spec: Spec, schedule: Schedule, source: Source, mesh: Mesh) -> Learner:
  is_probe = config.transfer.mode == 'linear_probe'
  below = [name for name, _ in spec.named_layers() if name != spec.head]
  frozen = tuple(frozen_layers(spec, below if is_probe else layer_patterns(config.transfer.freeze)))
  norms = [name for name, layer in spec.named_layers() if isinstance(layer, BatchNorm) and name in frozen]
  try:
    rate = config.optimizer.rate_by_step(schedule.total_steps, schedule.steps_per_epoch)
  except ValueError as error:
    hint = f'set optimizer.warmup_steps, for example to {schedule.total_steps // 10}'
    raise UsageError(f'{error}; {hint}') from None
  fixed = () if config.transfer.update_frozen_statistics else tuple(norms)
  dtype = jnp.dtype(config.model.dtype)
  dense_input = parallel.dense_input(mesh) if config.mesh.model > 1 else None
  model = AlexNet(
    spec, config.model.num_classes, dtype=dtype, fixed_norms=fixed, dense_input_sharding=dense_input
  )
  tx = freeze(optimizer(config.optimizer, rate, spec), frozen)
  return Learner(model, tx, rate, frozen, None if is_probe else _preprocess(config, spec, source))


def _preprocess(config: Config, spec: Spec, source: Source) -> Preprocess:
  if not config.augment.is_on:
    return functools.partial(normalize, preprocessing=spec.preprocessing)
  augmentation, name = config.augment, config.data.dataset
  if components := read_components(source.folder, name):
    augmentation = dataclasses.replace(augmentation, components=components)
  elif augmentation.pca_noise:
    what = f'needs the principal components of {name!r}, which alexnet-flax prepare {name} --side ...'
    raise UsageError(f'augment.pca_noise (={augmentation.pca_noise}) {what} computes')
  of_spec = functools.partial(augment, preprocessing=spec.preprocessing)
  classes = config.model.num_classes or spec.num_classes
  return functools.partial(of_spec, augmentation=augmentation, num_classes=classes)


def _steps(config: Config, learner: Learner, mesh: Mesh) -> Steps:
  replicated = NamedSharding(mesh, PartitionSpec())
  spec, loss = learner.model.spec, LOSSES[config.loss.name]
  head = linear_probe.head_of(spec.head, learner.model.num_classes or spec.num_classes)

  def init() -> TrainState:
    key, shape = jax.random.key(config.seed), (spec.image_size, spec.image_size, 3)
    ema = config.optimizer.ema_decay
    state = step_functions.create_train_state(learner.model, learner.tx, key, shape, ema)
    return state if learner.preprocess is not None else dataclasses.replace(state, apply_fn=head.apply)

  step = functools.partial(
    step_functions.train_step,
    loss=functools.partial(loss, label_smoothing=config.loss.label_smoothing),
    preprocess=learner.preprocess,
    accumulate_steps=config.optimizer.accumulate_steps,
  )
  evaluate = functools.partial(step_functions.eval_step, loss=loss, preprocess=learner.preprocess)
  # XLA then neither tries algorithms for their speed nor adds in the order of arrival.
  on_gpus = mesh.devices.flat[0].platform in ('gpu', 'cuda', 'rocm')
  options = {'xla_gpu_deterministic_ops': True} if config.deterministic and on_gpus else None
  state = parallel.state_sharding(jax.eval_shape(init), spec, mesh)
  jit = functools.partial(jax.jit, compiler_options=options)
  rate = config.optimizer.learning_rate
  guarded = step_functions.guarded(step, config.on_nonfinite, rate, learner.frozen)
  return Steps(
    jax.jit(init, out_shardings=state),
    jit(guarded, donate_argnums=0, out_shardings=(state, replicated, replicated, replicated)),
    jit(evaluate, out_shardings=replicated),
    NamedSharding(mesh, PartitionSpec(parallel.AXES)),
    replicated,
    state,
    options,
  )


def _resolve(config: Config, source: Source, devices: int) -> Config:
  """Fills in the values that the configuration leaves to variant, data set and other keys."""
  model, data, split = config.model, config.data, config.mesh.model
  num_classes, theirs = model.num_classes or len(source.class_names), f'{len(source.class_names)} classes'
  if num_classes < len(source.class_names):
    raise UsageError(f'model.num_classes (={num_classes}) is less than the {theirs} of {source.name}')
  on_devices = {'crop_on': data.crop_on == 'device', 'on_device': data.on_device}
  rotates = any(on_devices.values()) and data.train_view.rotation > 0
  feeds = {**on_devices, 'rotation': rotates, 'num_processes': data.num_processes > 0}
  chosen = [f'data.{key}' for key, is_set in feeds.items() if is_set]
  if len(chosen) > 1:
    raise UsageError(f'{" and ".join(chosen)} exclude one another: set one of them')
  if chosen and config.transfer.mode == 'linear_probe':
    raise UsageError(f'{chosen[0]} does nothing with transfer.mode=linear_probe; leave it out')
  if devices % split:
    possible = ', '.join(str(count) for count in range(1, devices + 1) if devices % count == 0)
    raise UsageError(f'mesh.model (={split}) must divide the number of devices (={devices}): {possible}')
  evaluated, side = data.eval_batch_size or data.batch_size, build_spec(config).image_size
  for key, size, micro in (
    ('data.batch_size', data.batch_size, config.optimizer.accumulate_steps),
    ('data.eval_batch_size', evaluated, 1),
  ):
    if size % (devices * micro):
      by = f'devices (={devices})' + (f' times optimizer.accumulate_steps (={micro})' if micro > 1 else '')
      nearest = max(round(size / (devices * micro)), 1) * devices * micro
      raise UsageError(f'{key} (={size}) must be divisible by the number of {by}; the nearest is {nearest}')
    images, here = size // jax.process_count(), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if images * side**2 * 3 > here:  # the system might end the process without a word
      what = f'{images:,} images of {side}x{side} pixels, {images * side**2 * 3 / 1e9:,.0f} GB'
      raise UsageError(
        f'{key} (={size}): {what}, do not fit the memory of this machine, {here / 1e9:,.0f} GB'
      )
  model = dataclasses.replace(model, image_size=side, num_classes=num_classes)
  return dataclasses.replace(config, model=model, data=dataclasses.replace(data, eval_batch_size=evaluated))
