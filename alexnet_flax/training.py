"""The training loop: when to log, evaluate, save and stop.

What happens then is in the modules that are called; what a run consists of, in `run.py`.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from alexnet_flax import checkpoint, run_log
from alexnet_flax.batches import eval_batches, train_batches, with_features
from alexnet_flax.config import Config
from alexnet_flax.errors import DivergedError, UsageError
from alexnet_flax.metrics import Metrics
from alexnet_flax.run import Run, compile_train_step, prepare_run
from alexnet_flax.run_folder import make_folder, write_config
from alexnet_flax.starting import start, training_lines
from alexnet_flax.steps import Batch, TrainState

_PROFILE_AFTER_STEPS = 10


def train(config: Config, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains to the configuration's end, going on from the last checkpoint in `workdir`.

  Returns:
    What the last evaluation measured: loss, top1, top5.

  Raises:
    UsageError: configuration, data or folder do not allow the run; a run in the folder is as it was.
    DivergedError: the loss, or the parameters' norm, is not finite.
  """
  folder = pathlib.Path(workdir).expanduser()
  # TensorFlow takes as long to import as the step to compile: do both at once.
  background = concurrent.futures.ThreadPoolExecutor(1)
  tensorflow = background.submit(_import_pipeline)
  run = prepare_run(config)
  make_folder(folder)
  manager = checkpoint.checkpoint_manager(folder / 'checkpoints', config.keep_checkpoints)
  latest = manager.latest_step()
  if latest is not None and latest > run.total_steps:
    raise UsageError(
      f'{folder} has been trained for {latest} steps, more than the {run.total_steps} asked for; use'
      ' another --workdir or a greater --config.total_steps'
    )
  replicated = NamedSharding(run.sharding.mesh, PartitionSpec())
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), run.state)
  if latest is None:
    state, lines = start(run)
  else:
    state, lines = checkpoint.restore(manager, latest, like), []
  compiled = dataclasses.replace(run, train_step=compile_train_step(run, like))
  tensorflow.result()
  background.shutdown()
  if config.transfer.mode == 'linear_probe':
    run = with_features(run, state)
    compiled = dataclasses.replace(compiled, features=run.features)
  batches = train_batches(run, int(state.step))
  first = list(itertools.islice(batches, 1))  # before the folder's files are touched
  write_config(folder, run.config, resumed=latest is not None)
  log = run_log.RunLog(folder, int(state.step), run.total_steps, run.steps_per_epoch)
  run.bad.say = log.say
  try:
    for line in [_opening_line(run, int(state.step), folder), *lines, *training_lines(run, state)]:
      log.say(line)
    values = _loop(compiled, state, itertools.chain(first, batches), manager, log, folder)
    log.say(_closing_line(run, values, folder))
    if run.bad.skipped:
      log.say(run.bad.summary())
    return values
  finally:
    log.close()
    manager.close()


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


def _loop(
  run: Run,
  state: TrainState,
  batches: Iterable[Batch],
  manager: Any,
  log: run_log.RunLog,
  folder: pathlib.Path,
) -> dict[str, float]:
  config, first_step = run.config, int(state.step)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)  # not the key that drew the parameters
  eval_period = config.eval_every_steps or config.eval_every_epochs * run.steps_per_epoch
  save_period = config.checkpoint_every_steps or config.checkpoint_every_epochs * run.steps_per_epoch
  last = run.total_steps
  values: dict[str, float] = {}
  window: list[Metrics] = []
  window_start = time.monotonic()
  profiled = range(0)
  if config.profile_steps:
    start = min(first_step + _PROFILE_AFTER_STEPS, last - config.profile_steps)
    profiled = range(max(start, first_step), last)[: config.profile_steps]

  for step, batch in enumerate(batches, start=first_step + 1):
    if profiled and step - 1 == profiled[0]:
      jax.profiler.start_trace(folder / 'profile')
    state, metrics = run.train_step(state, batch, key)
    window.append(metrics)
    if len(window) > 2:
      jax.block_until_ready(window[-3])  # or the host would enqueue batches without end
    if profiled and step - 1 == profiled[-1]:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
    log.advance(step)

    evaluates, saves = (is_time(step, period, last) for period in (eval_period, save_period))
    if evaluates or saves or is_time(step, config.log_every_steps, last):
      _check_losses(window, step, run)
      total = sum_metrics(window)
      trained = log.write(
        step,
        'train',
        total,
        learning_rate=float(run.schedule(step - 1)),
        images_per_second=float(total.images) / (time.monotonic() - window_start),
      )
      log.show(step, 'train', trained)
      window, scored = [], None
      if evaluates or saves:
        _check_state(state, step, run)
      if evaluates:
        measured = evaluate(run, state)
        if not math.isfinite(measured['loss']):
          raise _diverged(f'the evaluated loss is {measured["loss"]} after step {step}', step, run)
        values = scored = log.write(step, _evaluated_name(run), measured)
        log.show(step, _evaluated_name(run), values)
        _check_count(measured, run, log)
      if saves:
        checkpoint.save(manager, state, scored)
      window_start = time.monotonic()
  manager.wait_until_finished()
  if first_step >= last:  # the run had ended before
    values = evaluate(run, state).means()
  return values


def _check_losses(window: list[Metrics], step: int, run: Run) -> None:
  for number, metrics in enumerate(jax.device_get(window), start=step - len(window) + 1):
    if not math.isfinite(metrics['loss']):
      raise _diverged(f'the loss is {metrics["loss"]} at step {number}', number, run)


def _check_count(measured: Metrics, run: Run, log: run_log.RunLog) -> None:
  """An evaluation never leaves out pictures silently."""
  total = run.eval_source.num_examples
  if int(measured.images) != total:
    log.say(f'{_evaluated_name(run)}: {int(measured.images):,} of {total:,} pictures were counted')


def _check_state(state: TrainState, step: int, run: Run) -> None:
  """An update can break the parameters after a finite loss; such a state must not be saved."""
  # In float32 the squares overflow long before the values do, when all is lost already.
  norm = float(_norm((state.params, state.batch_stats)))
  if not math.isfinite(norm):
    raise _diverged(f"the parameters' norm is {norm} after step {step}", step, run)


_norm = jax.jit(optax.tree.norm)


def _diverged(what: str, step: int, run: Run) -> DivergedError:
  return DivergedError(
    f'{what} (learning rate {float(run.schedule(step - 1)):.3g}); lower optimizer.learning_rate, lengthen'
    ' optimizer.warmup_epochs or set optimizer.clip_norm=1, and start again: the checkpoints are from before'
  )


def _evaluated_name(run: Run) -> str:
  """The evaluated split's name in the log, where 'train' is what the steps themselves measured."""
  split = run.config.data.eval_split
  return 'train[:]' if split == 'train' else split


def _import_pipeline() -> None:
  import alexnet_flax.data.pipeline  # noqa: F401


def _opening_line(run: Run, step: int, folder: pathlib.Path) -> str:
  config = run.config
  parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
  device = jax.devices()[0]
  return (
    f'{"resuming" if step else "training"} {config.model.variant} ({parameters:,} parameters,'
    f' {config.model.image_size}x{config.model.image_size}) on {run.train_source.num_examples:,} images of'
    f' {run.train_source.name}, {jax.device_count()} x {device.device_kind}, steps {step + 1} to'
    f' {run.total_steps}, in {folder}'
  )


def _closing_line(run: Run, values: dict[str, float], folder: pathlib.Path) -> str:
  split, lines = _evaluated_name(run), run_log.read_metrics(folder)
  top1 = {line['step']: line['value'] for line in lines if (line['split'], line['name']) == (split, 'top1')}
  best = max(top1, key=lambda step: top1[step], default=None)
  return (
    f'done: {run.total_steps} steps ({run.total_steps / run.steps_per_epoch:.1f} epochs) in'
    f' {lines[-1]["seconds"] if lines else 0:.0f} s; {split}: {run_log.format_values(values)};'
    + ('' if best is None else f' best top1 {top1[best]:.2%} at step {best};')
    + f' {folder}'
  )
