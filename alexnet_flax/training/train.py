"""Trains: prepares folder, data, devices and state, runs the loop, and reports the end."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from alexnet_flax import checkpoint
from alexnet_flax.config import Config, all_keys, from_dict, idle_keys, to_dict, value_of
from alexnet_flax.data.source import read_labels
from alexnet_flax.data.tfds_source import IMAGE_FOLDER
from alexnet_flax.errors import PreemptedError, StoppedError, UsageError, one_line
from alexnet_flax.files.buckets import fetched, url_of
from alexnet_flax.steps import GuardedStep, TrainState
from alexnet_flax.training import callbacks as builtin
from alexnet_flax.training import distributed, trackers
from alexnet_flax.training.batches import train_batches, with_features
from alexnet_flax.training.bucket_run import run_folder
from alexnet_flax.training.callbacks import Callback
from alexnet_flax.training.experiment import Experiment, compile_train_step
from alexnet_flax.training.initialize import initial_state, training_lines
from alexnet_flax.training.logger import Logger, format_values, read_metrics, steady_output
from alexnet_flax.training.loop import Request, drive, make_steps, run_steps
from alexnet_flax.training.preemption import GracefulShutdown
from alexnet_flax.training.seeds import build_experiments, run_folders, steps_maker
from alexnet_flax.training.workdir import changed_keys, make_folder, sole_writer, versions, write_records

# Keys that may differ from machine to machine, and do not change what a run computes.
LOCAL_KEYS = ('data.data_dir', 'data.mirror', 'data.num_threads', 'data.num_processes')
_CLASSES = 20  # that are listed


def train(
  config: Config, workdir: str | os.PathLike[str], callbacks: Sequence[Callback] = ()
) -> dict[str, float]:
  """Trains to the configuration's end, resuming from the last whole checkpoint in `workdir`.

  Nothing is done, nor written, where the folder's run has ended. With `num_seeds` the folder holds a run for
  each seed, in seed-SEED, that is the same as if it were trained alone.

  SIGTERM, SIGINT and SIGHUP end training after a step, with a checkpoint. Under `jax.distributed`, every
  process calls this; the folder must be the same for all, and process 0 writes the logs.

  Args:
    config: The configuration.
    workdir: The run's folder; also in a bucket, gs://... or s3://...
    callbacks: Called after the run's own (logging, evaluation, checkpoints), when they are due.

  Returns:
    What the last evaluation measured: loss, top1, top5; with several seeds, their means.

  Raises:
    UsageError: Configuration, data or folder do not allow the run, or it has ended with other keys; a run in
      the folder is left as it was.
    DivergedError: The loss, or the parameters' norm, is not finite.
    PreemptedError: The end was requested, and the state is saved; or a bucket does not answer.
  """
  config = from_dict(to_dict(config))  # checked, wherever it comes from
  with run_folder(workdir) as folder:
    return _train_in(folder, config, callbacks)


def _train_in(folder: pathlib.Path, config: Config, callbacks: Sequence[Callback]) -> dict[str, float]:
  try:
    with GracefulShutdown() as shutdown, steady_output(folder), contextlib.ExitStack() as stack:
      shared = {name: value_of(config, name) for name in all_keys() if name not in LOCAL_KEYS}
      distributed.check_equal(shared | versions())
      with distributed.together():
        for line in idle_keys(config).values():
          raise UsageError(f'{line}; leave it as it is by default')
        if jax.process_index() == 0:
          trackers.check_installed(config.tracker)
        experiments = build_experiments(config)
        folders = run_folders(folder, config)
        for one in folders:
          make_folder(one)
          if jax.process_index() == 0:
            stack.enter_context(sole_writer(one))
      experiment = experiments[0]
      for source in (experiment.data.train, experiment.data.evaluated):
        parts = {'version': source.identity, 'number of images': source.num_examples}
        parts |= {'classes': source.class_names}
        distributed.check_equal({f"{source.name}'s {what}": part for what, part in parts.items()})
      distributed.check_one_folder(folder)
      make = steps_maker(experiment, len(folders))

      @functools.cache  # for all seeds: their experiments share model, optimizer and steps
      def compiled() -> GuardedStep:
        alone = make is make_steps
        return compile_train_step(experiment, _placed(experiment)) if alone else experiment.steps.train

      runs = []
      for of_seed, place in zip(experiments, folders, strict=True):
        label = f'seed {of_seed.config.seed}' if len(folders) > 1 else ''
        runs.append(_train(of_seed, place, callbacks, shutdown, compiled, label))
      return _summary(experiments, drive(runs, make), folder)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      raise _out_of_memory(config, error) from None
    raise
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UsageError(f'no room in {folder}: {error.strerror}; make some, and start again') from None
    if error.errno == errno.ENOMEM:
      raise _out_of_memory(config, error) from None
    if str(error.filename).startswith(str(folder)):  # of another owner, read-only, a file for a folder
      raise UsageError(f'cannot write {error.filename}: {error.strerror}') from None
    raise


def _out_of_memory(config: Config, error: Exception) -> UsageError:
  data, optimizer = config.data, config.optimizer
  micro = f'raise optimizer.accumulate_steps (={optimizer.accumulate_steps})'
  lower = [f'lower data.batch_size (={data.batch_size})', f'or {micro}']
  if data.eval_batch_size and data.eval_batch_size > data.batch_size:
    lower.insert(0, f'lower data.eval_batch_size (={data.eval_batch_size})')
  if data.on_device:
    lower.insert(0, 'leave out data.on_device')
  what = (
    ' '.join(str(error).removeprefix('RESOURCE_EXHAUSTED: ').split())[:200].rstrip('.') or 'no more was given'
  )
  return UsageError(f'out of memory: {what}; {", ".join(lower)}; the last checkpoint is whole')


def _placed(experiment: Experiment) -> TrainState:
  """Returns the shapes of the state, and where its leaves lie."""
  placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
  return jax.tree.map(placed, experiment.state, experiment.steps.state)


def _summary(
  experiments: Sequence[Experiment], ended: Sequence[dict[str, float] | Exception], folder: pathlib.Path
) -> dict[str, float]:
  """Returns the means over the seeds; raises the first error that ended one of them."""
  values = [one for one in ended if not isinstance(one, Exception) and one]
  errors = [one for one in ended if isinstance(one, Exception)]
  if len(values) > 1:
    top1 = np.array([one['top1'] for one in values])
    error = np.std(top1, ddof=1) / np.sqrt(len(top1))
    split = experiments[0].eval_split
    shown = f'top1 {top1.mean():.2%} ± {error:.2%}'.replace('%', ' %')
    print(one_line(f'{len(values)} seeds: {split}: {shown} (standard error); {folder}'))
  for experiment, one in zip(experiments, ended, strict=True):
    if len(errors) > 1 and isinstance(one, Exception):
      print(f'seed {experiment.config.seed}: {one}')
  if errors:  # a run that was asked to end goes on, whatever became of others
    raise next((one for one in errors if isinstance(one, PreemptedError)), errors[0])
  return {name: float(np.mean([one[name] for one in values])) for name in values[0]} if values else {}


def _train(
  experiment: Experiment,
  folder: pathlib.Path,
  callbacks: Sequence[Callback],
  shutdown: GracefulShutdown,
  compiled: Callable[[], GuardedStep],
  label: str,
) -> Generator[Request, Any, dict[str, float]]:
  config, last, is_writer = experiment.config, experiment.schedule.total_steps, jax.process_index() == 0
  with distributed.together():
    latest = checkpoint.latest_whole(folder / 'checkpoints', folder / 'damaged', print) if is_writer else None
  latest = distributed.gather(latest)[0]
  with distributed.together():  # of a run in a bucket, each has a copy
    place = fetched(folder / 'checkpoints' / str(latest))
    if url_of(place) and latest is not None and not is_writer and (wrong := checkpoint.damage(place)):
      raise UsageError(f'the copy of {place} is damaged: {wrong}; start again')
  if latest is not None and latest > last:
    advice = 'use another --workdir or a greater --config.total_steps'
    raise UsageError(
      f'{folder} has been trained for {latest} steps, more than the {last} asked for; {advice}'
    )
  if latest == last:
    return _finished(experiment, folder)
  manager = checkpoint.checkpoint_manager(folder / 'checkpoints', config.keep_checkpoints)
  if latest is None:
    state, lines = initial_state(experiment)
  else:
    state, lines = checkpoint.restore(manager, latest, _placed(experiment)), []
  first_step = int(state.step)
  experiment = dataclasses.replace(experiment, steps=dataclasses.replace(experiment.steps, train=compiled()))
  if shutdown.requested:
    raise PreemptedError('stopped before the first step; the same command starts it again')
  if experiment.learner.preprocess is None:
    experiment = with_features(experiment, state)
  batches = train_batches(experiment, first_step, folder=folder)
  first = list(itertools.islice(batches, 1))  # before the folder's files are touched
  if is_writer:
    write_records(folder, config, experiment.data.train.class_names, first_step, _images(experiment))
  per_epoch = experiment.schedule.steps_per_epoch
  logger = Logger(folder, first_step, last, per_epoch, is_writer, label, config.tracker)
  bad = experiment.data.bad
  bad.say = logger.say if is_writer else print
  try:
    opening = _opening_line(experiment, first_step, folder), *_class_lines(experiment)
    for line in [*opening, *lines, *training_lines(experiment, state)]:
      logger.say(line)
    due = builtin.profiler(config.profile_steps, first_step, last, folder)
    due += builtin.all_callbacks(experiment, manager, logger, folder, callbacks)
    progress, stopped = yield from run_steps(
      experiment, state, itertools.chain(first, batches), due, shutdown
    )
    with distributed.together():
      builtin.finish_save(manager, experiment, logger)
    saved = distributed.gather(manager.latest_step() or 0)[0]
    if stopped:
      where = 'there' if saved == progress.step else f'step {saved}, after which nothing could be saved'
      ended = f'ended at step {progress.step} of {last}, as asked'
      raise StoppedError(f'{ended}; the same command goes on from {where}')
    logger.say(_closing_line(experiment, progress.values, folder))
    if saved != last:  # on_save_error=continue
      logger.say(f'warning: step {saved} is the last that is saved; the same command goes on from there')
    return progress.values
  finally:
    if bad.skipped:  # each process of what it read
      bad.say(bad.summary())
    logger.close()
    manager.close()


def _finished(experiment: Experiment, folder: pathlib.Path) -> dict[str, float]:
  split, last = experiment.eval_split, experiment.schedule.total_steps
  if changes := changed_keys(folder, experiment.config, last, _images(experiment)):
    keys = ', '.join(f'{key} (={now!r}) was {was!r}' for key, (was, now) in changes.items())
    raise UsageError(f'the run in {folder} is finished, and {keys}; use another --workdir')
  lines = [line for line in read_metrics(folder) if (line['step'], line['split']) == (last, split)]
  values = {line['name']: line['value'] for line in lines}
  if jax.process_index() == 0:
    print(one_line(f'the run in {folder} is finished; nothing is trained, and its files stay as they are'))
    print(one_line(_closing_line(experiment, values, folder)), flush=True)
  return values


def _images(experiment: Experiment) -> str:
  """What tells whether a run goes on with the images that it had."""
  train = experiment.data.train
  return f'{train.num_examples:,} of {train.identity[:40]}'


def _opening_line(experiment: Experiment, step: int, folder: pathlib.Path) -> str:
  model, source = experiment.config.model, experiment.data.train
  parameters = sum(leaf.size for leaf in jax.tree.leaves(experiment.state.params))
  what = f'{model.variant} ({parameters:,} parameters, {model.image_size}x{model.image_size})'
  where = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  where += f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  images = f'{source.num_examples:,} images of {source.name}'
  steps = f'steps {step + 1} to {experiment.schedule.total_steps}'
  return f'{"resuming" if step else "training"} {what} on {images}, {where}, {steps}, in {folder}'


def _class_lines(experiment: Experiment) -> Iterator[str]:
  """Yields a line with the classes of the user's own images, and how many images each has."""
  data = experiment.data
  if experiment.config.data.dataset == IMAGE_FOLDER:
    names = data.train.class_names
    counts = [np.bincount(read_labels(x), minlength=len(names)) for x in (data.train, data.evaluated)]
    shown = [f'{name} {train} + {held}' for name, train, held in zip(names, *counts, strict=True)][:_CLASSES]
    more = f', and {len(names) - len(shown)} more' if len(names) > len(shown) else ''
    yield f'{len(names)} classes, images to train on + to evaluate on: {", ".join(shown)}{more}'


def _closing_line(experiment: Experiment, values: dict[str, float], folder: pathlib.Path) -> str:
  split, schedule, lines = experiment.eval_split, experiment.schedule, read_metrics(folder)
  seconds = lines[-1]['seconds'] if lines else 0
  scores = [(x['value'], -x['step']) for x in lines if (x['split'], x['name']) == (split, 'top1')]
  top1, step = max(scores, default=(0, 0))
  best = f' best top1 {top1:.2%} at step {-step};' if scores else ''
  done = f'{schedule.total_steps} steps ({schedule.total_steps / schedule.steps_per_epoch:.1f} epochs)'
  return f'done: {done} in {seconds:.0f} s; {split}: {format_values(values)};{best} {folder}'
