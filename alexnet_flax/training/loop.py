"""The steps of a run: when to log, evaluate, save and stop. What happens then is in what is called."""

import collections
import json
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from alexnet_flax import checkpoint
from alexnet_flax.checkpoint import SaveError
from alexnet_flax.data import sampling
from alexnet_flax.errors import DivergedError, PreemptedError, UsageError
from alexnet_flax.metrics import Metrics
from alexnet_flax.steps import Batch, TrainState
from alexnet_flax.training import loop
from alexnet_flax.training.experiment import Run, eval_batches
from alexnet_flax.training.logger import RunLog
from alexnet_flax.training.preemption import StopRequest

_PROFILE_AFTER_STEPS = 10
_AHEAD = 2  # steps that the host may be ahead of the devices
_SKIPPED_AT_MOST = 50  # updates in a row


def run_steps(
  run: Run,
  state: TrainState,
  batches: Iterable[Batch],
  manager: Any,
  log: RunLog,
  folder: pathlib.Path,
  request: StopRequest,
) -> tuple[TrainState, dict[str, float]]:
  """Makes all steps from `state.step` to the last.

  Args:
    run: whose `train_step` is compiled.
    state: before the first of them.
    batches: of those steps.
    manager: of checkpoints.
    log: of the run.
    folder: of the run.
    request: whether to end early.

  Returns:
    The last state, and what the last evaluation measured.

  Raises:
    DivergedError: an update was not finite, and that ends the run.
    PreemptedError: the end was asked for; the state is saved.
    UsageError: a checkpoint cannot be written, and that ends the run.
  """
  config, first_step, last = run.config, int(state.step), run.total_steps
  key = jax.random.fold_in(jax.random.key(config.seed), 1)  # not the key that drew the parameters
  eval_period = config.eval_every_steps or config.eval_every_epochs * run.steps_per_epoch
  save_period = config.checkpoint_every_steps or config.checkpoint_every_epochs * run.steps_per_epoch
  values: dict[str, float] = {}
  window = Window(first_step)
  profiled = _profiled(config.profile_steps, first_step, last)
  going = jax.device_put(np.array(True), run.replicated)
  # Of steps that are over: all processes see the same of the same step, and so end at the same.
  stops: collections.deque[jax.Array] = collections.deque(maxlen=_AHEAD + 1)

  for step, batch in enumerate(batches, start=first_step + 1):
    if profiled and step - 1 == profiled[0]:
      jax.profiler.start_trace(folder / 'profile')
    state, metrics, going, stop = run.train_step(state, batch, key, going, _stops(run, request))
    window.add(metrics, going)
    if profiled and step - 1 == profiled[-1]:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
    log.advance(step)

    evaluates, saves = (is_time(step, period, last) for period in (eval_period, save_period))
    stops.append(stop)
    stopping = request.asked if jax.process_count() == 1 else len(stops) > _AHEAD and bool(stops[0])
    if evaluates or saves or stopping or is_time(step, config.log_every_steps, last):
      _check(window, step, state, run, folder, log)
      trained = window.write(log, step, run)
      if trained:
        log.show(step, 'train', trained)
      scored = None
      if evaluates:
        measured = evaluate(run, state)
        if not math.isfinite(measured['loss']):
          raise _diverged(f'the evaluated loss is {measured["loss"]} after step {step}', step, run)
        values = scored = log.write(step, evaluated_name(run), measured)
        log.show(step, evaluated_name(run), values)
        _check_count(measured, run, log)
      if saves or stopping:
        _save(manager, state, scored, run, log)
      window = Window(step, window.skipped_in_a_row())
    if stopping and step < last:
      _finish(manager, run, log)
      saved = manager.latest_step() or 0
      where = 'there' if saved == step else f'step {saved}, after which nothing could be saved'
      raise PreemptedError(f'ended at step {step} of {last}, as asked; the same command goes on from {where}')
  _finish(manager, run, log)
  if first_step >= last:  # the run had ended before
    values = evaluate(run, state).means()
  return state, values


def is_time(step: int, period: float, last_step: int) -> bool:
  """Whether something due every `period` steps (not always whole) is due after this many steps.

  >>> [step for step in range(1, 8) if is_time(step, 2.5, 7)]
  [3, 5, 7]
  """
  # The tolerance is for periods such as 10 / 3, of which every third multiple is whole.
  count, before = (math.floor(s / period + 1e-9) for s in (step, step - 1))
  return count > before or step == last_step


def evaluate(run: Run, state: TrainState) -> Metrics:
  """Loss, top-1 and top-5 over every image of the evaluated split, once each."""
  return sum_metrics([run.eval_step(state, batch) for batch in eval_batches(run)])


def sum_metrics(parts: Iterable[Metrics]) -> Metrics:
  """The sum over batches, on the host in float64, in which counts are exact."""
  host = [jax.tree.map(float, part) for part in jax.device_get(list(parts))]
  return jax.tree.map(lambda *values: math.fsum(values), *host)


def evaluated_name(run: Run) -> str:
  """The evaluated split's name in the log, where 'train' is what the steps themselves measured."""
  split = run.config.data.eval_split
  return 'train[:]' if split == 'train' else split


class Window:
  """What the steps since the last line of the log have measured, still on the devices."""

  def __init__(self, step: int, skipped_in_a_row: int = 0):
    """Begins after `step`, to whose end so many updates were left out."""
    self.first_step, self.start = step + 1, time.monotonic()
    self._skipped_before = skipped_in_a_row
    self.metrics: list[Metrics] = []
    self.going: list[jax.Array] = []

  def add(self, metrics: Metrics, going: jax.Array) -> None:
    """Takes note of a step, and waits for one before it: the host must not enqueue without end."""
    self.metrics.append(metrics)
    self.going.append(going)
    if len(self.metrics) > _AHEAD:
      jax.block_until_ready(self.metrics[-_AHEAD - 1])

  def first_failure(self) -> int | None:
    """The first step whose update was not finite."""
    going = jax.device_get(self.going)
    return next((self.first_step + i for i, went in enumerate(going) if not went), None)

  def skipped(self) -> int:
    """How many updates were left out."""
    return sum(not went for went in jax.device_get(self.going))

  def skipped_in_a_row(self) -> int:
    """How many were left out without a break up to the end, those before this window included."""
    row = self._skipped_before
    for went in jax.device_get(self.going):
      row = 0 if went else row + 1
    return row

  def write(self, log: RunLog, step: int, run: Run) -> dict[str, float]:
    """Logs the window; nothing if no step of it counts."""
    total = sum_metrics(self.metrics)
    others = {'learning_rate': float(run.schedule(step - 1))}
    if run.config.on_nonfinite == 'skip':
      others['skipped_steps'] = float(self.skipped())
    if not total.images:
      return {}
    others['images_per_second'] = float(total.images) / (time.monotonic() - self.start)
    return log.write(step, 'train', total, **others)


def _stops(run: Run, request: StopRequest) -> jax.Array:
  """bool [devices]: whether this process was asked to end, for each of its devices."""
  mine = np.full(jax.local_device_count(), request.asked)
  return jax.make_array_from_process_local_data(run.sharding, mine)


def _profiled(count: int, first_step: int, last: int) -> range:
  start = min(first_step + _PROFILE_AFTER_STEPS, last - count)
  return range(max(start, first_step), last)[:count]


def _check(window: Window, step: int, state: TrainState, run: Run, folder: pathlib.Path, log: RunLog) -> None:
  """Ends the run at an update that was not finite, or says how many were left out."""
  failed = window.first_failure()
  if run.config.on_nonfinite == 'skip':
    count, row = window.skipped(), window.skipped_in_a_row()
    if count:
      log.say(f'steps {window.first_step} to {step}: {count} updates were not finite and were left out')
    if row < _SKIPPED_AT_MOST:
      return
    failed, what = step, f'{row} updates in a row were not finite'
  elif failed is None:
    return
  else:
    loss = float(window.metrics[failed - window.first_step]['loss'])
    what = f'the loss is {loss}' if not math.isfinite(loss) else 'the update is not finite'
  try:
    where = f'; the state before it is in {loop.record(folder, state, failed, what, run)}'
  except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
    where = f'; the state before it cannot be written: {" ".join(str(error).split())[:200]}'
  raise _diverged(f'{what} at step {failed}', failed, run, where)


def _save(manager: Any, state: TrainState, scored: dict[str, float] | None, run: Run, log: RunLog) -> None:
  _finish(manager, run, log)  # if the save before did not succeed, this one still may
  try:
    checkpoint.save(manager, state, scored)
  except SaveError as error:
    _on_save_error(error, run, log)


def _finish(manager: Any, run: Run, log: RunLog) -> None:
  try:
    checkpoint.finish(manager)
  except SaveError as error:
    _on_save_error(error, run, log)


def _on_save_error(error: SaveError, run: Run, log: RunLog) -> None:
  # Of several processes the others would wait for a save that never ends.
  if run.config.on_save_error == 'stop' or jax.process_count() > 1:
    raise UsageError(f'{error}; make room and start again: the checkpoints before it are whole') from None
  log.say(f'warning: {error}; the run goes on, and the checkpoints before it are whole')


def _check_count(measured: Metrics, run: Run, log: RunLog) -> None:
  """An evaluation never leaves out images silently."""
  total = run.eval_source.num_examples
  if int(measured.images) != total:
    log.say(f'{evaluated_name(run)}: {int(measured.images):,} of {total:,} images were counted')


def _diverged(what: str, step: int, run: Run, where: str = '') -> DivergedError:
  rate = float(run.schedule(step - 1))
  return DivergedError(
    f'{what} (learning rate {rate:.3g}){where}; lower optimizer.learning_rate, lengthen'
    ' optimizer.warmup_epochs or set optimizer.clip_norm=1, and start again: the checkpoints are from before'
  )


def record(folder: pathlib.Path, state: TrainState, step: int, what: str, run: Run) -> pathlib.Path:
  """Writes `folder`/failures/STEP: `state/` (Orbax), and `batch.json` with the step and its examples.

  Args:
    folder: of the run.
    state: before the step.
    step: that broke.
    what: was found.
    run: of which it is.

  Returns:
    The folder written.
  """
  place = (folder / 'failures' / str(step)).resolve()
  config, source = run.config, run.train_source
  chosen = sampling.batch_indices(config.seed, step - 1, config.data.batch_size, source.num_examples)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(place / 'state', checkpoint.saved_tree(state), force=True)
  if jax.process_index() == 0:
    names = [example.name for example in source.read(chosen)]
    examples = [{'index': index, 'name': name} for index, name in zip(chosen.tolist(), names, strict=True)]
    rate = float(run.schedule(step - 1))
    found = {'step': step, 'what': what, 'learning_rate': rate, 'data': source.name, 'examples': examples}
    (place / 'batch.json').write_text(json.dumps(found, indent=1) + '\n')
  return folder / 'failures' / str(step)
