"""`alexnet-flax doctor`: checks machine, data and recipe for common problems, and suggests fixes."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np
import scipy.stats

from alexnet_flax.config import Config
from alexnet_flax.data import import_tensorflow
from alexnet_flax.diagnostics import determinism
from alexnet_flax.errors import UsageError, install_command
from alexnet_flax.files import expanded
from alexnet_flax.inference.layer_stats import layer_statistics
from alexnet_flax.losses import LOSSES
from alexnet_flax.models.spec import Activation, BatchNorm
from alexnet_flax.optim import freeze, optimizer
from alexnet_flax.steps import Batch, TrainState, train_step
from alexnet_flax.training.batches import eval_batches, train_batches
from alexnet_flax.training.experiment import Experiment, build_experiment, check_devices
from alexnet_flax.training.initialize import initial_state
from alexnet_flax.training.workdir import versions

_OVERFIT_STEPS = 20
_OVERFIT_IMAGES = 32
_TIMED_SECONDS = 3.0
_NO_THREAD_CACHE = 'glibc.malloc.tcache_count=0'

Verdict = Literal['ok', 'look', 'bad']


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of one check, and what to do if it is not ok."""

  verdict: Verdict
  what: str
  advice: str = ''

  def __str__(self) -> str:
    advice = f'\n      -> {self.advice}' if self.advice and self.verdict != 'ok' else ''
    return f'{self.verdict:5} {self.what}{advice}'


def examine(config: Config, workdir: str) -> bool:
  """Runs all checks, prints their results, and returns whether one is bad."""
  bad = False
  for finding in findings(config, workdir):
    print(finding)
    bad |= finding.verdict == 'bad'
  return bad


def findings(config: Config, workdir: str) -> Iterator[Finding]:
  """Yields the results of the checks; ends early if there is no device or no data."""
  yield Finding('ok', ', '.join(f'{name} {version}' for name, version in versions().items()))
  try:
    yield from devices()
    yield c_library()
    yield _tensorflow()
    experiment = build_experiment(config)
    batches = train_batches(experiment, 0, 1 << 30)  # as many as the timing takes
    batch = next(batches)
    next(eval_batches(experiment))
    state, _ = initial_state(experiment)
  except UsageError as error:
    yield Finding('bad', str(error), 'fix this first; the other checks need a device and a batch')
    return
  train, evaluated = experiment.data.train, experiment.data.evaluated
  counts = f'{train.num_examples:,} and {evaluated.num_examples:,} examples'
  yield Finding('ok', f'data: {train.name} and {evaluated.name}, {counts}, readable')
  yield disk(experiment, expanded(workdir))
  yield from recipe(experiment)
  if experiment.learner.preprocess is None:
    yield Finding('look', 'a linear probe does not train the network, so it is not checked')
    return
  yield _throughput(experiment, itertools.chain([batch], batches))
  yield repeats(experiment, state, batch)
  yield from check_network(experiment, state, batch)


def devices() -> Iterator[Finding]:
  """Checks which devices JAX uses, and whether it misses a GPU."""
  check_devices()
  kinds = {device.device_kind for device in jax.devices()}
  yield Finding('ok', f'{jax.device_count()} x {", ".join(sorted(kinds))} ({jax.default_backend()})')
  if jax.default_backend() == 'cpu' and shutil.which('nvidia-smi'):
    advice = (
      f'{install_command("cuda")}; TensorFlow with its own CUDA may hide the GPU from JAX: use tensorflow-cpu'
    )
    yield Finding('bad', 'this machine has an NVIDIA driver, but JAX runs on the CPU', advice)


def c_library() -> Finding:
  """Checks whether a step on one CPU device finds its memory again (glibc's bug 30723)."""
  name, version = platform.libc_ver()
  is_old = name == 'glibc' and tuple(map(int, version.split('.'))) < (2, 39)
  is_kept = jax.default_backend() == 'cpu' and jax.device_count() == 1  # see keep_cpu_memory
  is_set = _NO_THREAD_CACHE in os.environ.get('GLIBC_TUNABLES', '').split(':')
  what = f'C library: {name} {version}'.rstrip()
  if not is_old or not is_kept or is_set:
    return Finding('ok', what)
  advice = f'a step may take its memory two or three times: export GLIBC_TUNABLES={_NO_THREAD_CACHE}'
  return Finding('look', f'{what}, before 2.39, splits memory that is free', advice)


def _tensorflow() -> Finding:
  tf = import_tensorflow()
  hidden = len(tf.config.list_physical_devices('GPU'))
  what = f'supports {hidden} GPUs, which are hidden from it' if hidden else 'sees no GPU'
  cuda = tf.test.is_built_with_cuda()
  return Finding(
    'look' if cuda else 'ok',
    f'TensorFlow {tf.__version__} {what}{"; it is built for CUDA" if cuda else ""}',
    'its CUDA may not be that of JAX: pip uninstall tensorflow, and pip install tensorflow-cpu',
  )


def disk(experiment: Experiment, folder: pathlib.Path) -> Finding:
  """Checks whether the disk has room for the checkpoints of a run."""
  whole = pathlib.Path(os.path.realpath(folder))
  existing = next(path for path in (whole, *whole.parents) if os.path.exists(path))
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(experiment.state))
  needed = size * (experiment.config.keep_checkpoints + 2)  # the best one, and one that is being written
  free = shutil.disk_usage(existing).free
  what = f'disk: {free / 1e9:,.1f} GB free in {folder}; checkpoints may take {needed / 1e9:,.1f} GB'
  advice = 'free some space, use another --workdir, or set keep_checkpoints=1'
  return Finding('bad' if needed > free else 'ok', what, advice)


def recipe(experiment: Experiment) -> Iterator[Finding]:
  """Checks whether BatchNorm's momentum fits the number of steps, and the learning rate the batch."""
  config, settings = experiment.config, experiment.config.optimizer
  momenta = [layer.momentum for layer in experiment.spec.layers if isinstance(layer, BatchNorm)]
  if momenta:
    momentum, updates = max(momenta), experiment.schedule.total_steps * settings.accumulate_steps
    left = momentum**updates
    what = f"BatchNorm's momentum of {momentum:g} leaves {left:.1%} of the initial statistics at the end"
    fitting = f'{max(1 - 10 / updates, 0.5):.2g}'
    advice = f'evaluation uses them: set model.batch_norm_momentum={fitting}, or train for more steps'
    yield Finding('look' if left > 0.01 else 'ok', what, advice)
  if settings.name == 'sgd':
    rate, batch, usual = settings.learning_rate, config.data.batch_size, 0.2 if momenta else 0.05
    what = f'learning rate {rate:g} at batch {batch}, that is {rate * 256 / batch:.2g} for 256 images'
    advice = f'rates grow with the batch: set optimizer.learning_rate={usual * batch / 256:.2g}, or less'
    yield Finding('look' if rate * 256 / batch > usual else 'ok', what, advice)


def _throughput(experiment: Experiment, batches: Iterator[Batch]) -> Finding:
  """Compares the throughput of the input pipeline with that of the training step."""
  images = experiment.config.data.batch_size
  next(batches)
  input_rate = images / _median_seconds(lambda: jax.block_until_ready(next(batches)))
  state, batch, key = experiment.steps.init(), next(batches), jax.random.key(0)
  going = jax.device_put(np.array(True), experiment.steps.replicated)
  stops = jax.device_put(np.zeros(jax.device_count(), bool), experiment.steps.sharding)

  def step() -> None:
    nonlocal state
    state, *_ = jax.block_until_ready(experiment.steps.train(state, batch, key, going, stops))

  step()  # compiles
  step_rate = images / _median_seconds(step)
  slow = input_rate < 1.2 * step_rate
  return Finding(
    'look' if slow else 'ok',
    f'speed: the input gives {input_rate:,.0f} images/s, the step takes {step_rate:,.0f}:'
    f' the {"input" if slow else "step"} is the bottleneck',
    'alexnet-flax prepare NAME --side 256 writes smaller images, which load several times as fast',
  )


def repeats(experiment: Experiment, state: TrainState, batch: Batch) -> Finding:
  """Checks whether a step has the same bits each time, with all threads."""
  different = determinism.other_bits(experiment, state, batch)
  if different:
    what = f'{determinism.what_differed(different)}: runs do not repeat here'
    return Finding('look', what, determinism.advice(experiment.config))
  return Finding('ok', f'the same step gave the same bits, {determinism.TIMES} times')


def check_network(experiment: Experiment, state: TrainState, batch: Batch) -> Iterator[Finding]:
  """Checks the initial loss, whether the network can overfit a batch, and the share of dead units."""
  config = experiment.config
  count = min(_OVERFIT_IMAGES, config.data.batch_size)
  small = {name: jax.device_put(np.asarray(part)[:count]) for name, part in batch.items()}
  state = jax.device_put(jax.device_get(state), jax.devices()[0])
  losses, state = _overfit(experiment, state, small)
  first, last = losses[0], losses[-1]
  if config.loss.name != 'cross_entropy':
    yield Finding('ok', f'initial loss: {first:.4f}')
  else:
    classes = config.model.num_classes or experiment.spec.num_classes
    chance = math.log(classes)
    what = f'initial loss: {first:.3f}; chance among {classes} classes is ln({classes}) = {chance:.3f}'
    advice = 'the initialisation is too large, or the images are not normalised'
    yield Finding('ok' if first < 1.5 * chance else 'look', what, advice)
  what = f'{_OVERFIT_STEPS} steps on the same {count} images: the loss goes from {first:.3f} to {last:.3f}'
  enough = 0.8 * first
  if config.loss.name == 'cross_entropy':
    blind = float(scipy.stats.entropy(np.bincount(np.asarray(small['label']))))
    what += f' (without a look at the images, it could be {blind:.3f})'
    enough = min(enough, blind)
  advice = 'a network should overfit a single batch: try optimizer.learning_rate / 10, and times 10'
  verdict: Verdict = 'ok' if last < enough else 'look' if math.isfinite(last) else 'bad'
  yield Finding(verdict, what, advice)
  names = [name for name, layer in experiment.spec.named_layers() if layer == Activation('relu')]
  if not names:
    return
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  layers = layer_statistics(experiment.learner.model, variables, small['image'])
  dead = {layer.name: layer.dead for layer in layers if layer.name in names}
  what = 'dead units on these images: ' + ', '.join(f'{name} {share:.0%}' for name, share in dead.items())
  advice = 'lower optimizer.learning_rate, initialise biases above 0, or use BatchNorm'
  yield Finding('look' if max(dead.values()) > 0.5 else 'ok', what, advice)


def _overfit(experiment: Experiment, state: TrainState, batch: Batch) -> tuple[list[float], TrainState]:
  """Trains on one batch at the recipe's full learning rate, without augmentation; returns the losses."""
  settings, learner = experiment.config.optimizer, experiment.learner
  assert learner.preprocess is not None
  prepared = learner.preprocess(batch, None)
  plain = dataclasses.replace(settings, weight_decay=0.0, clip_norm=None)
  tx = freeze(optimizer(plain, settings.learning_rate, experiment.spec), learner.frozen)
  state = dataclasses.replace(state, tx=tx, opt_state=tx.init(state.params), ema=None, ema_decay=None)
  step = jax.jit(functools.partial(train_step, loss=LOSSES[experiment.config.loss.name]))
  losses = []
  for _ in range(_OVERFIT_STEPS):
    state, metrics = step(state, prepared, jax.random.key(0))
    losses.append(float(metrics['loss']))
  return losses, state


def _median_seconds(work: Callable[[], object]) -> float:
  """Returns the median duration of a function, repeated for some seconds."""
  times: list[float] = []
  end = time.monotonic() + _TIMED_SECONDS
  while not times or time.monotonic() < end:
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)
  return statistics.median(times)
