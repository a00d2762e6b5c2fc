"""`alexnet-flax doctor`: what could be wrong with machine, data and recipe, and what to do about it."""

import dataclasses
import functools
import itertools
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.layer_stats import layer_statistics
from alexnet_flax.losses import LOSSES
from alexnet_flax.models.spec import Activation
from alexnet_flax.optim import freeze, sgd
from alexnet_flax.steps import Batch, TrainState, train_step
from alexnet_flax.training.batches import eval_batches, train_batches
from alexnet_flax.training.experiment import Experiment, build_experiment, check_devices
from alexnet_flax.training.initialize import initial_state
from alexnet_flax.training.workdir import versions

_OVERFIT_STEPS = 20
_OVERFIT_IMAGES = 32
_TIMED_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that was looked at: what was found, and what to do where it is not well."""

  verdict: Literal['ok', 'look', 'bad']
  what: str
  advice: str = ''

  def __str__(self) -> str:
    return f'{self.verdict:5} {self.what}' + (f'\n      -> {self.advice}' if self.advice else '')


def examine(config: Config, workdir: str, say: Callable[[str], None] = print) -> bool:
  """Looks at everything, says each finding, and returns whether one is bad."""
  bad = False
  for finding in findings(config, workdir):
    say(str(finding))
    bad |= finding.verdict == 'bad'
  return bad


def findings(config: Config, workdir: str) -> Iterator[Finding]:
  """What is found, one after the other; those about the data end it if there are none."""
  yield _versions()
  try:
    yield from devices()
    yield _tensorflow()
    experiment = build_experiment(config)
    batches = train_batches(experiment, 0, 1 << 30)  # however long we look
    batch = next(batches)
    next(eval_batches(experiment))
    state, _ = initial_state(experiment)
  except UsageError as error:
    yield Finding('bad', str(error), 'mend this first; what follows needs a device and a batch')
    return
  counts = f'{experiment.data.train.num_examples:,} and {experiment.data.evaluated.num_examples:,}'
  yield Finding(
    'ok',
    f'data: {experiment.data.train.name} and {experiment.data.evaluated.name}, {counts} examples, readable',
  )
  yield disk(experiment, pathlib.Path(workdir).expanduser())
  if experiment.learner.preprocess is None:
    yield Finding('look', 'a linear probe: the network itself is not trained, and not examined')
    return
  yield _starving(experiment, itertools.chain([batch], batches))
  yield from first_aid(experiment, state, batch)


def _versions() -> Finding:
  return Finding('ok', ', '.join(f'{name} {version}' for name, version in versions().items()))


def devices() -> Iterator[Finding]:
  """The devices that JAX sees, and whether it overlooks a GPU."""
  check_devices()
  kinds = {device.device_kind for device in jax.devices()}
  yield Finding('ok', f'{jax.device_count()} x {", ".join(sorted(kinds))} ({jax.default_backend()})')
  if jax.default_backend() == 'cpu' and shutil.which('nvidia-smi'):
    yield Finding(
      'bad',
      'this machine has an NVIDIA driver, and JAX runs on the CPU',
      'pip install --require-hashes -r requirements/cuda.txt; TensorFlow with its own CUDA may hide the GPU'
      ' from JAX: use tensorflow-cpu',
    )


def _tensorflow() -> Finding:
  import tensorflow as tf

  import alexnet_flax.data.loader  # noqa: F401 - hides GPUs from TensorFlow

  hidden = len(tf.config.list_physical_devices('GPU'))
  what = f'TensorFlow {tf.__version__} sees no GPU; it only decodes images'
  if hidden:
    what = f'TensorFlow {tf.__version__} could take {hidden} GPUs, which are hidden from it'
  if tf.test.is_built_with_cuda():
    advice = 'its CUDA libraries may be other ones than those JAX needs: pip uninstall tensorflow, and'
    return Finding('look', f'{what}; it is built for CUDA', f'{advice} pip install tensorflow-cpu')
  return Finding('ok', what)


def disk(experiment: Experiment, folder: pathlib.Path) -> Finding:
  """Whether the checkpoints of a run find room."""
  existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(experiment.state))
  needed = size * (experiment.config.keep_checkpoints + 2)  # the best, and the one that is being written
  free = shutil.disk_usage(existing).free
  what = f'disk: {free / 1e9:,.1f} GB free in {folder}; checkpoints may take {needed / 1e9:,.1f} GB'
  if needed > free:
    return Finding('bad', what, 'make room, use another --workdir, or set keep_checkpoints=1')
  return Finding('ok', what)


def _starving(experiment: Experiment, batches: Iterator[Batch]) -> Finding:
  """Images a second of the input against those of the step."""
  images = experiment.config.data.batch_size
  next(batches)
  input_rate = images / _seconds_each(lambda: jax.block_until_ready(next(batches)))
  state, batch, key = experiment.steps.init(), next(batches), jax.random.key(0)
  going = jax.device_put(np.array(True), experiment.steps.replicated)
  stops = jax.device_put(np.zeros(jax.device_count(), bool), experiment.steps.sharding)

  def step() -> None:
    nonlocal state
    state, *_ = jax.block_until_ready(experiment.steps.train(state, batch, key, going, stops))

  step()  # compiles
  step_rate = images / _seconds_each(step)
  what = f'speed: the input gives {input_rate:,.0f} images/s, the step takes {step_rate:,.0f}'
  if input_rate < 1.2 * step_rate:
    return Finding(
      'look',
      f'{what}: the input starves the step',
      'alexnet-flax prepare NAME --side 256 makes images that are read several times as fast',
    )
  return Finding('ok', f'{what}: the step is the limit')


def first_aid(experiment: Experiment, state: TrainState, batch: Batch) -> Iterator[Finding]:
  """A network's first aid: its loss at the start, whether it can learn one batch, and its dead units."""
  count = min(_OVERFIT_IMAGES, experiment.config.data.batch_size)
  small = {name: jax.device_put(np.asarray(part)[:count]) for name, part in batch.items()}
  classes = experiment.config.model.num_classes or experiment.spec.num_classes
  state = jax.device_put(jax.device_get(state), jax.devices()[0])
  losses, state = _overfit(experiment, state, small)
  expected = math.log(classes)
  what = (
    f'loss at the start: {losses[0]:.3f}; guessing among {classes} classes has ln({classes}) = {expected:.3f}'
  )
  if experiment.config.loss.name != 'cross_entropy':
    yield Finding('ok', f'loss at the start: {losses[0]:.4f}')
  elif not losses[0] < 1.5 * expected:
    yield Finding('look', what, 'the initialisation is too wide, or the images are not normalised')
  else:
    yield Finding('ok', what)
  what = (
    f'{_OVERFIT_STEPS} steps on {count} images alone: the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}'
  )
  if not losses[-1] < 0.8 * losses[0]:
    advice = 'one batch should be learned by heart: try a tenth of optimizer.learning_rate, and ten times'
    yield Finding('look' if math.isfinite(losses[-1]) else 'bad', what, advice)
  else:
    yield Finding('ok', what)
  if any(layer == Activation('relu') for layer in experiment.spec.layers):
    yield dead_units(experiment, state, small)


def _overfit(experiment: Experiment, state: TrainState, batch: Batch) -> tuple[list[float], TrainState]:
  """The losses of some steps on one batch, at the recipe's full rate, without augmentation."""
  assert experiment.learner.preprocess is not None
  prepared = experiment.learner.preprocess(batch, None)
  tx = sgd(
    experiment.config.optimizer.learning_rate,
    spec=experiment.spec,
    momentum=experiment.config.optimizer.momentum,
  )
  tx = freeze(tx, experiment.learner.frozen)
  state = dataclasses.replace(state, tx=tx, opt_state=tx.init(state.params), ema=None, ema_decay=None)
  step = jax.jit(functools.partial(train_step, loss=LOSSES[experiment.config.loss.name]))
  losses = []
  for _ in range(_OVERFIT_STEPS):
    state, metrics = step(state, prepared, jax.random.key(0))
    losses.append(float(metrics['loss']))
  return losses, state


def dead_units(experiment: Experiment, state: TrainState, batch: Batch) -> Finding:
  """The share of channels of each ReLU that no image of a batch makes positive."""
  names = [name for name, layer in experiment.spec.named_layers() if layer == Activation('relu')]
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  measured = layer_statistics(experiment.learner.model, variables, batch['image'])
  shares = {layer.name: layer.dead for layer in measured if layer.name in names}
  what = 'units that are dead for these images: ' + ', '.join(f'{name} {x:.0%}' for name, x in shares.items())
  worst = max(shares.values(), default=0.0)
  if worst > 0.5:
    return Finding(
      'look', what, 'lower optimizer.learning_rate, or start biases above 0; BatchNorm helps too'
    )
  return Finding('ok', what)


def _seconds_each(work: Callable[[], object]) -> float:
  """The median seconds of a piece of work, repeated for some seconds."""
  times: list[float] = []
  end = time.monotonic() + _TIMED_SECONDS
  while not times or time.monotonic() < end:
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)
  return statistics.median(times)
