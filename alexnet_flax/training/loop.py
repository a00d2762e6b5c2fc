"""The training loop: makes the steps and calls the callbacks when they are due; of one run, or of several."""

import collections
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from alexnet_flax.errors import DivergedError, PreemptedError
from alexnet_flax.metrics import Metrics
from alexnet_flax.steps import Batch, GuardedStep, TrainState
from alexnet_flax.training.callbacks import AHEAD, Callback, Progress, Window
from alexnet_flax.training.experiment import Experiment
from alexnet_flax.training.preemption import GracefulShutdown

Value = TypeVar('Value')


class Request(NamedTuple):
  """A step to be made: the function of `steps.guarded`, and its arguments."""

  step: GuardedStep
  arguments: tuple[TrainState, Batch, jax.Array, jax.Array, jax.Array]


Result = tuple[TrainState, Metrics, jax.Array, jax.Array]


def run_steps(
  experiment: Experiment,
  state: TrainState,
  batches: Iterable[Batch],
  callbacks: Sequence[Callback],
  shutdown: GracefulShutdown,
) -> Generator[Request, Result, tuple[Progress, bool]]:
  """Asks for the steps from `state` to the last, one for each of `batches`, with `steps.train`.

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
    arguments = progress.state, batch, key, going, requested
    progress.state, metrics, going, stop = yield Request(steps.train, arguments)
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


def make_steps(requests: Sequence[Request]) -> list[Result]:
  """Makes each step by its own program. On a CPU they are computed at the same time."""
  return [request.step(*request.arguments) for request in requests]


def drive(
  runs: Sequence[Generator[Request, Any, Value]],
  make: Callable[[Sequence[Request]], Sequence[Result]] = make_steps,
) -> list[Value | Exception]:
  """Makes the steps that runs ask for, those of all runs together, to the end of each.

  Returns the values that they return; for a run that diverged or was stopped, its error. Any other error ends
  all of them.
  """
  waiting: dict[int, Request] = {}
  ended: dict[int, Value | Exception] = {}

  def advance(number: int, result: Result | None) -> None:
    try:
      waiting[number] = runs[number].send(result)
    except StopIteration as stop:
      ended[number] = stop.value
    except (DivergedError, PreemptedError) as error:
      ended[number] = error

  try:
    for number in range(len(runs)):
      advance(number, None)
    while waiting:
      numbers = sorted(waiting)
      results = make([waiting.pop(number) for number in numbers])
      for number, result in zip(numbers, results, strict=True):
        advance(number, result)
  finally:
    for run in runs:
      run.close()
  return [ended[number] for number in range(len(runs))]
