"""A run from its start to its end: folder, data, devices, the first state; its steps are in `loop.py`."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import pathlib

import jax

from alexnet_flax import checkpoint
from alexnet_flax.config import Config
from alexnet_flax.errors import PreemptedError, UsageError
from alexnet_flax.pretrained import write_names
from alexnet_flax.steps import TrainState
from alexnet_flax.training import logger
from alexnet_flax.training.experiment import (
  Run,
  compile_train_step,
  prepare_run,
  train_batches,
  with_features,
)
from alexnet_flax.training.initialize import start, training_lines
from alexnet_flax.training.loop import evaluated_name, run_steps
from alexnet_flax.training.preemption import StopRequest
from alexnet_flax.training.workdir import make_folder, sole_writer, write_config, write_environment


def train(config: Config, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains to the configuration's end, going on from the last whole checkpoint in `workdir`.

  SIGTERM and SIGINT end it after a step, with a checkpoint. Under `jax.distributed`, every process calls
  this; the folder must be the same for all, and process 0 writes the logs.

  Returns:
    What the last evaluation measured: loss, top1, top5.

  Raises:
    UsageError: configuration, data or folder do not allow the run; a run in the folder is as it was.
    DivergedError: the loss, or the parameters' norm, is not finite.
    PreemptedError: the end was asked for; the state is saved.
  """
  folder = pathlib.Path(workdir).expanduser()
  try:
    with StopRequest() as request, contextlib.ExitStack() as stack:
      return _train(config, folder, request, stack)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise UsageError(f'no room in {folder}: {error.strerror}; make some, and start again') from None


def _train(
  config: Config, folder: pathlib.Path, request: StopRequest, stack: contextlib.ExitStack
) -> dict[str, float]:
  # TensorFlow takes as long to import as the step to compile: do both at once.
  background = concurrent.futures.ThreadPoolExecutor(1)
  tensorflow = background.submit(_import_pipeline)
  run = prepare_run(config)
  make_folder(folder)
  if jax.process_index() == 0:
    stack.enter_context(sole_writer(folder))
  latest = checkpoint.latest_whole(folder / 'checkpoints', folder / 'damaged', print)
  if latest is not None and latest > run.total_steps:
    raise UsageError(
      f'{folder} has been trained for {latest} steps, more than the {run.total_steps} asked for; use'
      ' another --workdir or a greater --config.total_steps'
    )
  manager = checkpoint.checkpoint_manager(folder / 'checkpoints', config.keep_checkpoints)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=run.replicated), run.state)
  if latest is None:
    state, lines = start(run)
  else:
    state, lines = checkpoint.restore(manager, latest, like), []
  compiled = dataclasses.replace(run, train_step=compile_train_step(run, like))
  tensorflow.result()
  background.shutdown()
  if request.asked:
    raise PreemptedError('ended before the first step, as asked; the same command begins again')
  if config.transfer.mode == 'linear_probe':
    run = with_features(run, state)
    compiled = dataclasses.replace(compiled, features=run.features)
  batches = train_batches(run, int(state.step), folder)
  first = list(itertools.islice(batches, 1))  # before the folder's files are touched
  is_writer = jax.process_index() == 0
  if is_writer:
    write_config(folder, run.config, resumed=latest is not None)
    write_names(folder, run.train_source.class_names)
    write_environment(folder)
  log = logger.RunLog(folder, int(state.step), run.total_steps, run.steps_per_epoch, is_writer)
  run.bad.say = log.say if is_writer else print
  try:
    for line in [_opening_line(run, int(state.step), folder), *lines, *training_lines(run, state)]:
      log.say(line)
    state, values = run_steps(compiled, state, itertools.chain(first, batches), manager, log, folder, request)
    log.say(_closing_line(run, values, folder))
    if config.report and is_writer:
      _report(run, state, folder, log)
    return values
  finally:
    if run.bad.skipped:  # each process of what it read
      run.bad.say(run.bad.summary())
    log.close()
    manager.close()


def _import_pipeline() -> None:
  import alexnet_flax.data.loader  # noqa: F401


def _report(run: Run, state: TrainState, folder: pathlib.Path, log: logger.RunLog) -> None:
  """Writes report.html; the run has ended whatever comes of it."""
  if jax.process_count() > 1:  # the others would wait for this one, and take it for lost
    log.say(f'alexnet-flax report {folder} draws what it learned')
    return
  from alexnet_flax.viz.report import FILE, write_report
  from alexnet_flax.viz.report_run import subject_of

  try:
    write_report([subject_of(run, state, folder)], folder / FILE)
    log.say(f'{folder / FILE} shows what it learned')
  except Exception as error:
    log.say(f'warning: no report: {error}')


def _opening_line(run: Run, step: int, folder: pathlib.Path) -> str:
  config = run.config
  parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
  device = jax.devices()[0]
  processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  return (
    f'{"resuming" if step else "training"} {config.model.variant} ({parameters:,} parameters,'
    f' {config.model.image_size}x{config.model.image_size}) on {run.train_source.num_examples:,} images of'
    f' {run.train_source.name}, {jax.device_count()} x {device.device_kind}{processes}, steps {step + 1} to'
    f' {run.total_steps}, in {folder}'
  )


def _closing_line(run: Run, values: dict[str, float], folder: pathlib.Path) -> str:
  split, lines = evaluated_name(run), logger.read_metrics(folder)
  top1 = {line['step']: line['value'] for line in lines if (line['split'], line['name']) == (split, 'top1')}
  best = max(top1, key=lambda step: top1[step], default=None)
  return (
    f'done: {run.total_steps} steps ({run.total_steps / run.steps_per_epoch:.1f} epochs) in'
    f' {lines[-1]["seconds"] if lines else 0:.0f} s; {split}: {logger.format_values(values)};'
    + ('' if best is None else f' best top1 {top1[best]:.2%} at step {best};')
    + f' {folder}'
  )
