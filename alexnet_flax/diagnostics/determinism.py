"""Whether a compiled training step repeats to the bit on this machine, with all of its threads."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.config import Config
from alexnet_flax.steps import Batch, TrainState
from alexnet_flax.training.batches import train_batches
from alexnet_flax.training.experiment import Experiment, build_experiment

TIMES = 10


def advice(config: Config) -> str:
  """Returns what to do where steps do not repeat."""
  return 'use another machine or version' if config.deterministic else 'set deterministic=true'


def other_bits(experiment: Experiment, state: TrainState, batch: Batch, times: int = TIMES) -> int:
  """Makes the same step so many times, and returns how often its results had other bits than at first."""
  steps, key = experiment.steps, jax.random.key(0)
  going = jax.device_put(np.array(True), steps.replicated)
  stops = jax.device_put(np.zeros(jax.device_count(), bool), steps.sharding)
  first, different = None, 0
  for _ in range(times):
    copied = jax.tree.map(jnp.copy, state)  # for the step donates it
    new, metrics, *_ = steps.train(copied, batch, key, going, stops)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get((new.params, new.batch_stats, new.opt_state, metrics))):
      digest.update(np.asarray(leaf).tobytes())
    first = first or digest.digest()
    different += digest.digest() != first
  return different


def what_differed(different: int, times: int = TIMES) -> str:
  """Says how often the bits differed."""
  return f'the same step gave other bits in {different} of {times} repetitions'


def line_if_other_bits(config: Config, times: int = TIMES) -> str | None:
  """Builds a run's step, and returns what to say if it does not repeat; None if it does.

  The step of a linear probe is not checked.

  Raises:
    UsageError: The configuration does not fit the data or the devices.
  """
  experiment = build_experiment(config)
  if experiment.learner.preprocess is None:
    return None
  batch = next(train_batches(experiment, 0, 1))
  different = other_bits(experiment, experiment.steps.init(), batch, times)
  if not different:
    return None
  what = what_differed(different, times)
  return f'{what}: on this machine a run that resumes need not end with the same bits; {advice(config)}'
