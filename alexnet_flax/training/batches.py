"""The batches of a run, on its devices: of images, or of features that were computed once."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from alexnet_flax.data.source import Source
from alexnet_flax.data.views import EvalView
from alexnet_flax.files import read_lines, rewrite_lines
from alexnet_flax.steps import Batch, TrainState
from alexnet_flax.training import linear_probe
from alexnet_flax.training.experiment import Experiment


def with_features(experiment: Experiment, state: TrainState) -> Experiment:
  """Returns the experiment of a linear probe with the features of both splits, in the view of evaluation."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  data = experiment.data
  view = dataclasses.replace(data.eval_view, ten_crop=False)
  train, evaluated = (
    linear_probe.compute_features(experiment.learner.model, variables, _images_once(experiment, source, view))
    for source in (data.train, data.evaluated)
  )
  return dataclasses.replace(experiment, data=dataclasses.replace(data, features=(train, evaluated)))


def train_batches(
  experiment: Experiment, first_step: int, last_step: int | None = None, folder: pathlib.Path | None = None
) -> Iterator[Batch]:
  """Yields the batches of the steps from `first_step` to `last_step` (the run's if None), on the devices.

  The indices of their examples are recorded in `folder`, if the configuration asks for it.
  """
  from alexnet_flax.data import loader

  config, data = experiment.config, experiment.data
  steps: dict[str, Any] = {
    'seed': config.seed,
    'batch_size': config.data.batch_size,
    'first_step': first_step,
    'last_step': experiment.schedule.total_steps if last_step is None else last_step,
  }
  if data.features:
    batches = linear_probe.train_batches(data.features[0], **steps)
  else:
    batches = loader.train_batches(data.train, data.train_view, **steps, **_reading(experiment))
  if folder is not None and config.record_examples:
    batches = _recorded(batches, folder / f'examples-{jax.process_index()}.jsonl', first_step)
  return loader.to_devices(batches, experiment.steps.sharding)


def eval_batches(experiment: Experiment) -> Iterator[Batch]:
  """Yields the evaluated split, every example once, on the devices."""
  from alexnet_flax.data import loader

  data = experiment.data
  if data.features is None:
    return _images_once(experiment, data.evaluated, data.eval_view)
  batch_size = experiment.config.data.eval_batch_size or experiment.config.data.batch_size
  batches = linear_probe.eval_batches(data.features[1], batch_size=batch_size)
  return loader.to_devices(batches, experiment.steps.sharding)


def _images_once(experiment: Experiment, source: Source, view: EvalView) -> Iterator[Batch]:
  from alexnet_flax.data import loader

  batch_size = experiment.config.data.eval_batch_size or experiment.config.data.batch_size
  batches = loader.eval_batches(source, view, batch_size=batch_size, **_reading(experiment))
  return loader.to_devices(batches, experiment.steps.sharding)


def _reading(experiment: Experiment) -> dict[str, Any]:
  return {
    'process': jax.process_index(),
    'num_processes': jax.process_count(),
    'num_threads': experiment.config.data.num_threads,
    'bad': experiment.data.bad,
  }


def _recorded(
  batches: Iterator[dict[str, np.ndarray]], path: pathlib.Path, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the same batches, and writes a line for each when it is taken: {'step', 'examples'}."""
  rewrite_lines(path, [line for line in read_lines(path) if line['step'] <= first_step])
  with path.open('a', buffering=1) as file:
    for step, batch in enumerate(batches, start=first_step + 1):
      file.write(json.dumps({'step': step, 'examples': batch['index'].tolist()}) + '\n')
      yield batch
