"""The training loop: makes the steps and calls the callbacks when they are due."""

import collections
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from alexnet_flax.steps import Batch, TrainState
from alexnet_flax.training.callbacks import AHEAD, Callback, Progress, Window
from alexnet_flax.training.experiment import Experiment
from alexnet_flax.training.preemption import GracefulShutdown


def run_steps(
  experiment: Experiment,
  state: TrainState,
  batches: Iterable[Batch],
  callbacks: Sequence[Callback],
  shutdown: GracefulShutdown,
) -> tuple[Progress, bool]:
  """Makes the steps from `state` to the last, one for each of `batches`, with a compiled `steps.train`.

  Returns the progress after the last step made, and whether `shutdown` was requested before the run's last.
  """
  steps, last = experiment.steps, experiment.schedule.total_steps
  progress = Progress(experiment, state, int(state.step), Window(int(state.step) + 1))
  key = jax.random.fold_in(jax.random.key(experiment.config.seed), 1)  # not the key that drew the parameters
  going = jax.device_put(np.array(True), steps.replicated)
  # Of steps that are over: all processes see the same of the same step, and so end at the same.
  stops: collections.deque[jax.Array] = collections.deque(maxlen=AHEAD + 1)

  for step, batch in enumerate(batches, start=progress.step + 1):
    mine = np.full(jax.local_device_count(), shutdown.requested)  # for each device of this process
    requested = jax.make_array_from_process_local_data(steps.sharding, mine)
    progress.state, metrics, going, stop = steps.train(progress.state, batch, key, going, requested)
    progress.step = step
    progress.window.add(metrics, going)
    stops.append(stop)
    stopping = shutdown.requested if jax.process_count() == 1 else len(stops) > AHEAD and bool(stops[0])
    for callback in callbacks:
      if callback.is_due(step, last, stopping):
        callback.function(progress)
    if stopping and step < last:
      return progress, True
  return progress, False
