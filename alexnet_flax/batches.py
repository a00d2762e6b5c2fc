"""The batches of a run, on its devices: of pictures, or of features that were computed once."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from alexnet_flax import probe
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import EvalView
from alexnet_flax.run import Run
from alexnet_flax.run_log import read_lines, rewrite_lines
from alexnet_flax.steps import Batch, TrainState


def with_features(run: Run, state: TrainState) -> Run:
  """The run of a linear probe with the features of both splits, in the view of evaluation."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  view = dataclasses.replace(run.eval_view, ten_crop=False)
  sets = [
    probe.compute_features(run.model, variables, _pictures_once(run, source, view))
    for source in (run.train_source, run.eval_source)
  ]
  return dataclasses.replace(run, features=(sets[0], sets[1]))


def train_batches(run: Run, first_step: int, folder: pathlib.Path | None = None) -> Iterator[Batch]:
  """The batches of all steps from `first_step` to the last, on the devices.

  What they hold is recorded in `folder`, if that is given and asked for.
  """
  from alexnet_flax.data import pipeline

  steps: dict[str, Any] = {
    'seed': run.config.seed,
    'batch_size': run.config.data.batch_size,
    'first_step': first_step,
    'last_step': run.total_steps,
  }
  if run.features:
    batches = probe.train_batches(run.features[0], **steps)
  else:
    batches = pipeline.train_batches(run.train_source, run.train_view, **steps, **_reading(run))
  if folder is not None and run.config.record_examples:
    batches = _recorded(batches, folder / f'examples-{jax.process_index()}.jsonl', first_step)
  return pipeline.to_devices(batches, run.sharding)


def _recorded(
  batches: Iterator[dict[str, np.ndarray]], path: pathlib.Path, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """The same batches; a line for each, {'step', 'examples'}, when it is taken."""
  rewrite_lines(path, [line for line in read_lines(path) if line['step'] <= first_step])
  with path.open('a', buffering=1) as file:
    for step, batch in enumerate(batches, start=first_step + 1):
      file.write(json.dumps({'step': step, 'examples': batch['index'].tolist()}) + '\n')
      yield batch


def eval_batches(run: Run) -> Iterator[Batch]:
  """The evaluated split, every example once, on the devices."""
  if run.features:
    from alexnet_flax.data import pipeline

    batches = probe.eval_batches(run.features[1], batch_size=run.eval_batch_size)
    return pipeline.to_devices(batches, run.sharding)
  return _pictures_once(run, run.eval_source, run.eval_view)


def _pictures_once(run: Run, source: Source, view: EvalView) -> Iterator[Batch]:
  from alexnet_flax.data import pipeline

  batches = pipeline.eval_batches(source, view, batch_size=run.eval_batch_size, **_reading(run))
  return pipeline.to_devices(batches, run.sharding)


def _reading(run: Run) -> dict[str, Any]:
  return {
    'num_classes': run.config.model.num_classes,
    'process': jax.process_index(),
    'num_processes': jax.process_count(),
    'num_threads': run.config.data.num_threads,
    'bad': run.bad,
  }
