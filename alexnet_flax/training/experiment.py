"""What a run consists of, built from its configuration: data, network, optimiser, steps, devices."""

import dataclasses
import functools
import json
import os
import pathlib
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alexnet_flax import config as configuration
from alexnet_flax import steps
from alexnet_flax.config import Config
from alexnet_flax.data.augment import Augmentation, augment, normalize
from alexnet_flax.data.bad_images import BadImages, Policy
from alexnet_flax.data.prepare.color_pca import IMAGENET, read_components
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import Crop, EvalView, Resize, TrainView
from alexnet_flax.errors import UsageError
from alexnet_flax.losses import LOSSES
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import BatchNorm, Spec
from alexnet_flax.models.surgery import frozen_layers, layer_patterns
from alexnet_flax.optim import learning_rate_schedule, sgd
from alexnet_flax.steps import (
  Batch,
  Preprocess,
  TrainState,
  create_train_state,
  eval_step,
  guarded,
  train_step,
)
from alexnet_flax.training import linear_probe
from alexnet_flax.training.distributed import first_process_first
from alexnet_flax.training.linear_probe import FeatureSet
from alexnet_flax.training.logger import read_lines, rewrite_lines
from alexnet_flax.training.transfer import Head, freeze


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything a run consists of before its first step."""

  config: Config
  train_source: Source
  eval_source: Source
  model: AlexNet
  frozen: tuple[str, ...]  # layers whose parameters stay
  train_view: TrainView
  eval_view: EvalView
  bad: BadImages
  preprocess: Preprocess | None  # None for features
  eval_batch_size: int
  total_steps: int
  steps_per_epoch: float
  schedule: Any
  sharding: NamedSharding  # of batches; the state is replicated
  replicated: NamedSharding
  state: TrainState  # shapes only
  make_state: Any
  train_step: Any
  eval_step: Any
  features: tuple[FeatureSet, FeatureSet] | None = None  # of both splits, for a linear probe


def prepare_run(config: Config) -> Run:
  """Opens the data (preparing the embedded digits), and builds network, optimiser and steps.

  Raises:
    UsageError: configuration and data do not fit each other or the devices.
  """
  data = config.data
  check_devices()
  with first_process_first('data'):  # it prepares the embedded digits
    train_source = open_dataset(data.dataset, data.train_split, data.data_dir)
    eval_source = open_dataset(data.dataset, data.eval_split, data.data_dir)
  config = _resolve(config, train_source, jax.device_count())
  data, model_config, optimizer, transfer = config.data, config.model, config.optimizer, config.transfer
  if data.examples_per_class is not None:
    from alexnet_flax.data.source import few_per_class

    train_source = few_per_class(train_source, data.examples_per_class, config.seed)
  spec = configuration.network(config)
  frozen, fixed_norms = _frozen(config, spec)
  steps_per_epoch = train_source.num_examples / data.batch_size
  total_steps = config.total_steps or max(round(config.total_epochs * steps_per_epoch), 1)
  warmup = optimizer.warmup_steps
  try:
    schedule = learning_rate_schedule(
      optimizer.schedule,
      optimizer.learning_rate,
      total_steps,
      warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch) if warmup is None else warmup,
      boundaries=[round(epoch * steps_per_epoch) for epoch in optimizer.boundary_epochs],
      factor=optimizer.decay_factor,
      power=optimizer.decay_power,
      end=optimizer.end_learning_rate,
    )
  except ValueError as error:
    hint = f'set optimizer.warmup_steps, for example to {total_steps // 10}'
    raise UsageError(f'{error}; {hint}') from None
  tx = sgd(
    schedule,
    spec=spec,
    momentum=optimizer.momentum,
    nesterov=optimizer.nesterov,
    weight_decay=optimizer.weight_decay,
    clip_norm=optimizer.clip_norm,
  )
  mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
  replicated = NamedSharding(mesh, PartitionSpec())
  dtype = jnp.dtype(model_config.dtype)
  model = AlexNet(spec, model_config.num_classes, dtype=dtype, fixed_norms=fixed_norms)
  size, tx = spec.image_size, freeze(tx, frozen)
  probes = transfer.mode == 'linear_probe'

  def create() -> TrainState:
    state = create_train_state(model, tx, jax.random.key(config.seed), (size, size, 3), optimizer.ema_decay)
    head = Head(spec.head, model.num_classes or spec.num_classes)
    return dataclasses.replace(state, apply_fn=head.apply) if probes else state

  loss = functools.partial(LOSSES[config.loss.name], label_smoothing=config.loss.label_smoothing)
  preprocess = None if probes else _preprocess(config, spec, train_source)
  resize_side = round(size / spec.preprocessing.center_crop_share)
  step = functools.partial(
    train_step, loss=loss, preprocess=preprocess, accumulate_steps=optimizer.accumulate_steps
  )
  # XLA then neither tries algorithms for their speed nor adds in the order of arrival.
  options = {'xla_gpu_deterministic_ops': True} if config.deterministic and _on_gpus() else None
  evaluate_step = functools.partial(eval_step, loss=LOSSES[config.loss.name], preprocess=preprocess)
  return Run(
    config=dataclasses.replace(config, total_steps=total_steps),
    train_source=train_source,
    eval_source=eval_source,
    model=model,
    frozen=frozen,
    train_view=TrainView(
      size,
      crop=typing.cast(Crop, data.crop),
      crop_scale=data.crop_scale,
      crop_ratio=data.crop_ratio,
      resize_side=resize_side,
      flip=data.flip,
      rotation=data.rotation,
      fill=data.rotation_fill,
    ),
    eval_view=EvalView(size, resize_side, typing.cast(Resize, data.resize), data.ten_crop),
    bad=BadImages(typing.cast(Policy, data.on_bad_image)),
    preprocess=preprocess,
    eval_batch_size=data.eval_batch_size or data.batch_size,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    schedule=schedule,
    sharding=NamedSharding(mesh, PartitionSpec('data')),
    replicated=replicated,
    state=jax.eval_shape(create),
    make_state=jax.jit(create, out_shardings=replicated),
    train_step=jax.jit(
      guarded(step, typing.cast(steps.NonfinitePolicy, config.on_nonfinite)),
      donate_argnums=0,
      out_shardings=replicated,
      compiler_options=options,
    ),
    eval_step=jax.jit(evaluate_step, out_shardings=replicated, compiler_options=options),
  )


def compile_train_step(run: Run, like: TrainState) -> Any:
  """The training step compiled for the shapes of the run, before there is a batch."""
  images, size = run.config.data.batch_size, run.model.spec.image_size
  shape, dtype = (size, size, 3), jnp.uint8
  if run.config.transfer.mode == 'linear_probe':
    shape, dtype = like.params[run.model.spec.head]['kernel'].shape[:1], jnp.float32
  batch = {
    'image': jax.ShapeDtypeStruct((images, *shape), dtype, sharding=run.sharding),
    'label': jax.ShapeDtypeStruct((images,), jnp.int32, sharding=run.sharding),
    'weight': jax.ShapeDtypeStruct((images,), jnp.float32, sharding=run.sharding),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  going = jax.ShapeDtypeStruct((), jnp.bool_, sharding=run.replicated)
  stops = jax.ShapeDtypeStruct((jax.device_count(),), jnp.bool_, sharding=run.sharding)
  return run.train_step.lower(like, batch, key, going, stops).compile()


def check_devices() -> None:
  """Raises UsageError if JAX has no device of the kind that was asked for."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    asked, reason = os.environ.get('JAX_PLATFORMS', ''), ' '.join(str(error).split()) or 'there is none'
    raise UsageError(
      f'JAX finds no device of JAX_PLATFORMS={asked}: {reason}; unset it, or install requirements/cuda.txt'
    ) from None


def _on_gpus() -> bool:
  return jax.default_backend() in ('gpu', 'cuda', 'rocm')


def _preprocess(config: Config, spec: Spec, source: Source) -> Preprocess:
  """What the steps do to images: they augment if they are given a key."""
  options = dataclasses.asdict(config.augment)
  if not any(options.values()):
    return functools.partial(normalize, preprocessing=spec.preprocessing)
  components = read_components(source.folder, config.data.dataset)
  if components is None and config.augment.pca_noise:
    raise UsageError(
      f'augment.pca_noise (={config.augment.pca_noise}) needs the principal components of'
      f' {config.data.dataset!r}, which alexnet-flax prepare {config.data.dataset} --side ... computes'
    )
  return functools.partial(
    augment,
    preprocessing=spec.preprocessing,
    augmentation=Augmentation(**options, components=components or IMAGENET),
    num_classes=config.model.num_classes or spec.num_classes,
  )


def _frozen(config: Config, spec: Spec) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Layers whose parameters stay, and norms whose statistics do."""
  patterns = layer_patterns(config.transfer.freeze)
  if config.transfer.mode == 'linear_probe':
    patterns = [name for name, _ in spec.named_layers() if name != spec.head]
  frozen = tuple(frozen_layers(spec, patterns))
  norms = tuple(
    name for name, layer in spec.named_layers() if isinstance(layer, BatchNorm) and name in frozen
  )
  return frozen, () if config.transfer.update_frozen_statistics else norms


def _resolve(config: Config, source: Source, num_devices: int) -> Config:
  """The configuration with what was left to variant, data set and other keys filled in."""
  model, data = config.model, config.data
  classes = len(source.class_names)
  num_classes = model.num_classes or classes
  if num_classes < classes:
    raise UsageError(
      f'model.num_classes (={num_classes}) is less than the {classes} classes of {source.name}'
    )
  spec = configuration.network(config)
  sizes = {
    'data.batch_size': data.batch_size,
    'data.eval_batch_size': data.eval_batch_size or data.batch_size,
  }
  for key, size in sizes.items():
    by, parts = f'the number of devices (={num_devices})', num_devices
    if key == 'data.batch_size' and config.optimizer.accumulate_steps > 1:
      by += f' times optimizer.accumulate_steps (={config.optimizer.accumulate_steps})'
      parts *= config.optimizer.accumulate_steps
    if size % parts:
      nearest = max(round(size / parts), 1) * parts
      raise UsageError(f'{key} (={size}) must be divisible by {by}; the nearest is {nearest}')
  model = dataclasses.replace(model, image_size=spec.image_size, num_classes=num_classes)
  data = dataclasses.replace(data, eval_batch_size=sizes['data.eval_batch_size'])
  return dataclasses.replace(config, model=model, data=data)


def with_features(run: Run, state: TrainState) -> Run:
  """The run of a linear probe with the features of both splits, in the view of evaluation."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  view = dataclasses.replace(run.eval_view, ten_crop=False)
  sets = [
    linear_probe.compute_features(run.model, variables, _images_once(run, source, view))
    for source in (run.train_source, run.eval_source)
  ]
  return dataclasses.replace(run, features=(sets[0], sets[1]))


def train_batches(run: Run, first_step: int, folder: pathlib.Path | None = None) -> Iterator[Batch]:
  """The batches of all steps from `first_step` to the last, on the devices.

  What they hold is recorded in `folder`, if that is given and asked for.
  """
  from alexnet_flax.data import loader

  steps: dict[str, Any] = {
    'seed': run.config.seed,
    'batch_size': run.config.data.batch_size,
    'first_step': first_step,
    'last_step': run.total_steps,
  }
  if run.features:
    batches = linear_probe.train_batches(run.features[0], **steps)
  else:
    batches = loader.train_batches(run.train_source, run.train_view, **steps, **_reading(run))
  if folder is not None and run.config.record_examples:
    batches = _recorded(batches, folder / f'examples-{jax.process_index()}.jsonl', first_step)
  return loader.to_devices(batches, run.sharding)


def _recorded(
  batches: Iterator[dict[str, np.ndarray]], path: pathlib.Path, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """The same batches; a line for each, {'step', 'examples'}, when it is taken."""
  rewrite_lines(path, [line for line in read_lines(path) if line['step'] <= first_step])
  with path.open('a', buffering=1) as file:
    for step, batch in enumerate(batches, start=first_step + 1):
      file.write(json.dumps({'step': step, 'examples': batch['index'].tolist()}) + '\n')
      yield batch


def eval_batches(run: Run) -> Iterator[Batch]:
  """The evaluated split, every example once, on the devices."""
  if run.features:
    from alexnet_flax.data import loader

    batches = linear_probe.eval_batches(run.features[1], batch_size=run.eval_batch_size)
    return loader.to_devices(batches, run.sharding)
  return _images_once(run, run.eval_source, run.eval_view)


def _images_once(run: Run, source: Source, view: EvalView) -> Iterator[Batch]:
  from alexnet_flax.data import loader

  batches = loader.eval_batches(source, view, batch_size=run.eval_batch_size, **_reading(run))
  return loader.to_devices(batches, run.sharding)


def _reading(run: Run) -> dict[str, Any]:
  return {
    'num_classes': run.config.model.num_classes,
    'process': jax.process_index(),
    'num_processes': jax.process_count(),
    'num_threads': run.config.data.num_threads,
    'bad': run.bad,
  }
