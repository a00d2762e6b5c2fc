"""What happens at intervals during training: checks, logging, evaluation, checkpoints, profiling."""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import orbax.checkpoint as ocp

from alexnet_flax import checkpoint
from alexnet_flax.checkpoint import SaveError
from alexnet_flax.data import sampling
from alexnet_flax.data.images import printable
from alexnet_flax.errors import DivergedError, PreemptedError, UsageError
from alexnet_flax.files import write_json
from alexnet_flax.metrics import Metrics
from alexnet_flax.steps import TrainState
from alexnet_flax.training.batches import eval_batches
from alexnet_flax.training.experiment import Experiment
from alexnet_flax.training.logger import Logger

AHEAD = 2  # steps that the host may be ahead of the devices
_PROFILE_AFTER_STEPS = 10
_MAX_SKIPPED_IN_A_ROW = 50


@dataclasses.dataclass
class Window:
  """The measurements of the steps since the last log line, still on the devices."""

  first_step: int
  skipped_before: int = 0  # so many updates in a row, up to the first step
  start: float = dataclasses.field(default_factory=time.monotonic)
  metrics: list[Metrics] = dataclasses.field(default_factory=list)
  going: list[jax.Array] = dataclasses.field(default_factory=list)

  def add(self, metrics: Metrics, going: jax.Array) -> None:
    """Records a step, and waits for an earlier one: the host must not enqueue without end."""
    self.metrics.append(metrics)
    self.going.append(going)
    if len(self.metrics) > AHEAD:
      jax.block_until_ready(self.metrics[-AHEAD - 1])

  def skipped(self) -> list[int]:
    """Returns the steps whose update was not finite and was skipped."""
    return [step for step, went in enumerate(jax.device_get(self.going), self.first_step) if not went]

  def skipped_in_a_row(self) -> int:
    """Returns the number of skipped updates in a row up to the end, with those before this window."""
    row = self.skipped_before
    for went in jax.device_get(self.going):
      row = 0 if went else row + 1
    return row


@dataclasses.dataclass
class Progress:
  """What callbacks see of a run after a step, and may change."""

  experiment: Experiment
  state: TrainState
  step: int  # the number of steps made
  window: Window  # the measurements since the last log line
  values: dict[str, float] = dataclasses.field(default_factory=dict)  # last evaluated: loss, top1, top5
  evaluated_step: int | None = None  # the step of that evaluation


@dataclasses.dataclass(frozen=True)
class Callback:
  """A function that is called at intervals, with the `Progress`.

  Raises ValueError if it would never be called, or if a period is not positive.
  """

  function: Callable[[Progress], None]
  periods: tuple[float, ...] = ()  # in steps, not always whole; called after each, and after the last step
  steps: tuple[int, ...] = ()  # further steps after which it is called
  on_shutdown: bool = False  # whether it is called when the run is asked to end early

  def __post_init__(self) -> None:
    if not (self.periods or self.steps or self.on_shutdown):
      raise ValueError('a callback needs periods or steps, for example periods=(100.0,)')
    if any(period <= 0 for period in self.periods):
      raise ValueError(f'periods (={self.periods}) must be more than 0 steps')

  def is_due(self, step: int, last_step: int, shutdown: bool) -> bool:
    """Returns whether it is called after this step."""
    asked = step in self.steps or (shutdown and self.on_shutdown)
    return asked or any(is_time(step, period, last_step) for period in self.periods)


def is_time(step: int, period: float, last_step: int) -> bool:
  """Returns whether something due every `period` steps (not always whole) is due after this many steps.

  >>> [step for step in range(1, 8) if is_time(step, 2.5, 7)]
  [3, 5, 7]
  """
  # The tolerance is for periods such as 10 / 3, of which every third multiple is whole.
  count, before = (math.floor(s / period + 1e-9) for s in (step, step - 1))
  return count > before or step == last_step


def all_callbacks(
  experiment: Experiment,
  manager: ocp.CheckpointManager,
  logger: Logger,
  folder: pathlib.Path,
  others: Iterable[Callback],
) -> list[Callback]:
  """Returns the callbacks of a run in their order: check, log, evaluate, save, `others`."""
  evaluation, saving = experiment.schedule.eval_period, experiment.schedule.checkpoint_period
  every = float(experiment.config.log_every_steps), evaluation, saving

  def begin_window(progress: Progress) -> None:
    progress.window = Window(progress.step + 1, progress.window.skipped_in_a_row())

  return [
    Callback(lambda progress: logger.advance(progress.step), (1.0,)),
    Callback(lambda progress: check_finite(progress, logger, folder), every, on_shutdown=True),
    Callback(lambda progress: log_training(progress, logger), every, on_shutdown=True),
    Callback(lambda progress: log_evaluation(progress, logger), (evaluation,)),
    Callback(lambda progress: save(progress, manager, logger), (saving,), on_shutdown=True),
    *others,
    Callback(begin_window, every, on_shutdown=True),
  ]


def profiler(count: int, first_step: int, last_step: int, folder: pathlib.Path) -> list[Callback]:
  """Returns callbacks that trace some steps, from the tenth after the start, into `folder`/profile."""
  start = max(min(first_step + _PROFILE_AFTER_STEPS, last_step - count), first_step)
  end = min(start + count, last_step)
  if start >= end:
    return []

  def begin(*progress: Progress) -> None:
    jax.profiler.start_trace(folder / 'profile')

  def finish(progress: Progress) -> None:
    jax.block_until_ready(progress.state)
    jax.profiler.stop_trace()

  if start == first_step:
    begin()
  return [Callback(begin, steps=(start,)), Callback(finish, steps=(end,))]


def evaluate(experiment: Experiment, state: TrainState) -> Metrics:
  """Measures loss, top-1 and top-5 over every image of the evaluated split, once each."""
  return sum_metrics([experiment.steps.evaluate(state, batch) for batch in eval_batches(experiment)])


def sum_metrics(parts: Iterable[Metrics]) -> Metrics:
  """Adds up batches on the host in float64, in which counts are exact."""
  host = [jax.tree.map(float, part) for part in jax.device_get(list(parts))]
  return jax.tree.map(lambda *values: math.fsum(values), *host)


def check_finite(progress: Progress, logger: Logger, folder: pathlib.Path) -> None:
  """Ends the run at an update that was not finite, or says how many were skipped.

  Raises DivergedError if an update was not finite, and the configuration does not skip it.
  """
  window, step = progress.window, progress.step
  skipped, row = window.skipped(), window.skipped_in_a_row()
  if not skipped:
    return
  if progress.experiment.config.on_nonfinite == 'skip':
    first, count = window.first_step, len(skipped)
    logger.say(f'steps {first} to {step}: {count} updates were not finite and were left out')
    if row < _MAX_SKIPPED_IN_A_ROW:
      return
    failed, what = step, f'{row} updates in a row were not finite'
  else:
    failed = skipped[0]
    loss = float(window.metrics[failed - window.first_step]['loss'])
    what = f'the loss is {loss}' if not math.isfinite(loss) else 'the update is not finite'
  try:
    where = f'; the state before it is in {record_failure(progress, failed, what, folder)}'
  except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
    where = f'; the state before it cannot be written: {" ".join(str(error).split())[:200]}'
  raise _diverged(f'{what} at step {failed}', failed, progress.experiment, where)


def record_failure(progress: Progress, step: int, what: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes `folder`/failures/STEP: `state/` (Orbax; before the step), and `batch.json` with its examples."""
  config, source = progress.experiment.config, progress.experiment.data.train
  chosen = sampling.batch_indices(config.seed, step - 1, config.data.batch_size, source.num_examples)
  place = folder / 'failures' / str(step)
  checkpoint.save_alone(place / 'state', progress.state)
  if jax.process_index() == 0:
    inside = os.path.join(printable(source.folder), '')  # where the user keeps the images is not told
    names = [example.name.removeprefix(inside) for example in source.scan(chosen)]
    examples = [{'index': int(index), 'name': name} for index, name in zip(chosen, names, strict=True)]
    rate = float(progress.experiment.learner.learning_rate(step - 1))
    found = {'step': step, 'what': what, 'learning_rate': rate, 'data': source.name, 'examples': examples}
    write_json(place / 'batch.json', found)
  return place


def log_training(progress: Progress, logger: Logger) -> None:
  """Logs the means of the window; nothing if no step of it counts."""
  experiment, window, step = progress.experiment, progress.window, progress.step
  total = sum_metrics(window.metrics)
  if not total.images:
    return
  others = {'learning_rate': float(experiment.learner.learning_rate(step - 1))}
  if experiment.config.on_nonfinite == 'skip':
    others['skipped_steps'] = float(len(window.skipped()))
  others['images_per_second'] = float(total.images) / (time.monotonic() - window.start)
  logger.show(step, 'train', logger.write(step, 'train', total, **others))


def log_evaluation(progress: Progress, logger: Logger) -> None:
  """Evaluates and logs; raises DivergedError if the loss is not finite."""
  experiment, step, split = progress.experiment, progress.step, progress.experiment.eval_split
  measured = evaluate(experiment, progress.state)
  if not math.isfinite(measured['loss']):
    raise _diverged(f'the evaluated loss is {measured["loss"]} after step {step}', step, experiment)
  progress.values, progress.evaluated_step = logger.write(step, split, measured), step
  logger.show(step, split, progress.values)
  total = experiment.data.evaluated.num_examples
  if int(measured.images) != total:  # an evaluation never leaves out images silently
    logger.say(f'{split}: {int(measured.images):,} of {total:,} images were counted')


def save(progress: Progress, manager: ocp.CheckpointManager, logger: Logger) -> None:
  """Begins to save the state, with its scores if it has just been evaluated."""
  finish_save(manager, progress.experiment, logger)  # if the save before did not succeed, this one still may
  scores = progress.values if progress.evaluated_step == progress.step else None
  with _save_errors(progress.experiment, logger):
    checkpoint.save(manager, progress.state, scores)


def finish_save(manager: ocp.CheckpointManager, experiment: Experiment, logger: Logger) -> None:
  """Waits until the last save is complete; raises UsageError if it failed, and the run may not go on."""
  with _save_errors(experiment, logger):
    checkpoint.finish(manager)


@contextlib.contextmanager
def _save_errors(experiment: Experiment, logger: Logger) -> Iterator[None]:
  try:
    yield
  except SaveError as error:
    if 'timed out' in str(error):  # by the clock of the system, which may jump
      raise PreemptedError(f'{error}; the same command goes on from the checkpoint before it') from None
    if experiment.config.on_save_error == 'stop':
      message = f'{error}; make room and start again: the checkpoints before it are whole'
      raise UsageError(message) from None
    logger.say(f'warning: {error}; the run goes on, and the checkpoints before it are whole')


def _diverged(what: str, step: int, experiment: Experiment, where: str = '') -> DivergedError:
  rate = float(experiment.learner.learning_rate(step - 1))
  return DivergedError(
    f'{what} (learning rate {rate:.3g}){where}; lower optimizer.learning_rate, lengthen'
    ' optimizer.warmup_epochs or set optimizer.clip_norm=1, and start again: the checkpoints are from before'
  )
