"""The batches of a run, on its devices: of images, or of features that were computed once."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from alexnet_flax.data import loader, sampling
from alexnet_flax.data.device_views import view_maker
from alexnet_flax.data.processes import TrainingExamples, process_batches
from alexnet_flax.data.raw import RawImages
from alexnet_flax.data.resident import ResidentImages
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import EvalView
from alexnet_flax.files import read_lines, rewrite_lines
from alexnet_flax.steps import Batch, TrainState
from alexnet_flax.training import linear_probe
from alexnet_flax.training.experiment import Experiment
from alexnet_flax.training.watchdog import heard


def with_features(experiment: Experiment, state: TrainState) -> Experiment:
  """Returns the experiment of a linear probe with the features of both splits, in the view of evaluation."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  data, model = experiment.data, experiment.learner.model
  view = dataclasses.replace(data.eval_view, ten_crop=False)
  train, evaluated = (
    linear_probe.compute_features(model, variables, _images_once(experiment, source, view))
    for source in (data.train, data.evaluated)
  )
  return dataclasses.replace(experiment, data=dataclasses.replace(data, features=(train, evaluated)))


def train_batches(
  experiment: Experiment, first_step: int, last_step: int | None = None, folder: pathlib.Path | None = None
) -> Iterator[Batch]:
  """Yields the batches of the steps from `first_step` to `last_step` (the run's if None), on the devices.

  The indices of their examples are recorded in `folder`, if the configuration asks for it.
  """
  end = experiment.schedule.total_steps if last_step is None else last_step
  batches, finish = _host_batches(experiment, range(first_step, end))
  if folder is not None and experiment.config.record_examples:
    batches = _recorded(batches, folder, first_step)
  placed = loader.to_devices(batches, experiment.steps.sharding)
  return heard(map(finish, placed) if finish else placed, 'step', first_step + 1)


def _host_batches(
  experiment: Experiment, steps: range
) -> tuple[Iterator[loader.HostBatch], Callable[[Batch], Batch] | None]:
  """Returns what the host sends for each step, and what the devices make of it."""
  config, data, reading = experiment.config, experiment.data, _reading(experiment)
  seed, size, sharding = config.seed, config.data.batch_size, experiment.steps.sharding
  if data.features:
    features = data.features[0]
    chosen = (sampling.batch_indices(seed, step, size, len(features.labels)) for step in steps)
    return map(features.batch, chosen), None
  share = reading['process'], reading['num_processes']
  plan = loader.train_plan(data.train.num_examples, seed, size, *share)
  if config.data.on_device:
    resident = ResidentImages.load(data.train, data.train_view, sharding, **reading)
    return resident.batches(plan, steps), resident.maker(sharding)
  if config.data.num_processes:
    shared = {field.name for field in dataclasses.fields(TrainingExamples)} - {'seed', 'bad'}
    keys = {name: getattr(config.data, name) for name in shared}
    examples = TrainingExamples(**keys, seed=seed, bad=data.bad)
    return process_batches(examples, data.train_view, plan, steps, config.data.num_processes), None
  raw = RawImages.of(data.train, data.train_view) if config.data.crop_on == 'device' else None
  where: dict[str, Any] = {
    'seed': seed,
    'batch_size': size,
    'first_step': steps.start,
    'last_step': steps.stop,
  }
  batches = loader.train_batches(data.train, data.train_view, raw=raw, **where, **reading)
  return batches, view_maker(raw.view, raw.height, raw.width) if raw else None


def eval_batches(experiment: Experiment) -> Iterator[Batch]:
  """Yields the evaluated split, every example once, on the devices; padding has weight 0."""
  data, size = experiment.data, _eval_batch_size(experiment)
  if data.features is None:
    return _images_once(experiment, data.evaluated, data.eval_view)
  features = data.features[1]
  chosen = (np.arange(start, start + size) for start in range(0, len(features.labels), size))
  return loader.to_devices(map(features.batch, chosen), experiment.steps.sharding)


def _images_once(experiment: Experiment, source: Source, view: EvalView) -> Iterator[Batch]:
  size = _eval_batch_size(experiment)
  batches = loader.eval_batches(source, view, batch_size=size, **_reading(experiment))
  return heard(loader.to_devices(batches, experiment.steps.sharding), 'evaluation, batch', 1)


def _eval_batch_size(experiment: Experiment) -> int:
  return experiment.config.data.eval_batch_size or experiment.config.data.batch_size


def _reading(experiment: Experiment) -> dict[str, Any]:
  return {
    'process': jax.process_index(),
    'num_processes': jax.process_count(),
    'num_threads': experiment.config.data.num_threads,
    'bad': experiment.data.bad,
  }


def read_examples(path: pathlib.Path, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
  """Returns the lines of an examples-PROCESS.jsonl; arguments and errors as of `files.read_lines`."""
  return read_lines(path, {'step': int, 'examples': list}, say)


def _recorded(
  batches: Iterator[dict[str, np.ndarray]], folder: pathlib.Path, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the same batches, and writes a line for each when it is taken: {'step', 'examples'}.

  The lines that an earlier start wrote of later steps go before; the first process also removes those of
  processes that this start does not have.
  """
  own = folder / f'examples-{jax.process_index()}.jsonl'
  outdated = [own]
  if jax.process_index() == 0:
    others = (folder / f'examples-{number}.jsonl' for number in itertools.count(jax.process_count()))
    outdated += itertools.takewhile(pathlib.Path.exists, others)
  for path in outdated:
    rewrite_lines(path, [line for line in read_examples(path, print) if line['step'] <= first_step])
  with own.open('a', buffering=1, encoding='utf-8') as file:
    for step, batch in enumerate(batches, start=first_step + 1):
      file.write(json.dumps({'step': step, 'examples': batch['index'].tolist()}) + '\n')
      yield batch
