"""Experiment trackers beside TensorBoard: each gets what metrics.jsonl has, and none can end a run."""

import contextlib
import contextvars
import itertools
import logging
import os
import pathlib
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, NamedTuple

from flax import traverse_util

from alexnet_flax.errors import needs_extra
from alexnet_flax.files import read_json, write_json

FILE = 'tracker.json'  # in a run's folder: by tracker, the run's id and the last step sent of each split
PROJECT = 'alexnet_flax'
Values = Mapping[str, float]  # 'train/loss': 0.5, ...


class Tracked(NamedTuple):
  """A run that a tracker has opened."""

  id: str  # by which it is opened again
  log: Callable[[int, Values], object]  # takes a step
  close: Callable[[bool], object]  # takes whether the run has come to its end


class Tracking:
  """Sends a run to a tracker; after the first failure it does nothing more."""

  def __init__(
    self,
    tracker: str,
    folder: pathlib.Path,
    name: str,
    lines: list[dict[str, Any]],
    say: Callable[[str], None],
  ):
    """Opens the folder's run, or goes on with it, and sends those lines of metrics.jsonl that it lacks."""
    self._tracker, self._path, self._say = tracker, folder / FILE, say
    self._run: Tracked | None = None
    with self._surviving():
      stored = read_json(self._path) or {}
      id, self._sent = stored.get(tracker, (None, {}))
      config = traverse_util.flatten_dict(read_json(folder / 'config.json') or {}, sep='.')
      self._run = TRACKERS[tracker](name, id, config)
      self._stored = stored | {tracker: (self._run.id, self._sent)}
      write_json(self._path, self._stored)
      say(f'tracked by {tracker} as {self._run.id}')
    for (step, split), group in itertools.groupby(lines, lambda line: (line['step'], line['split'])):
      self.log(step, split, {line['name']: line['value'] for line in group})

  def log(self, step: int, split: str, values: Values) -> None:
    """Sends the values of a step, unless they were sent before a kill that made the step anew."""
    if self._run and step > self._sent.get(split, 0):
      with self._surviving():
        self._run.log(step, {f'{split}/{name}': value for name, value in values.items()})
        self._sent[split] = step
        write_json(self._path, self._stored)

  def close(self, total_steps: int) -> None:
    """Ends the run at the tracker, as complete if its last step was sent; it can be opened again."""
    if self._run:
      with self._surviving():
        self._run.close(max(self._sent.values(), default=0) >= total_steps)

  @contextlib.contextmanager
  def _surviving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # trackers raise errors of any kind, and the run is worth more than they are
      reason = ' '.join(str(error).split())[:200] or type(error).__name__
      self._run = None
      self._say(f'warning: {self._tracker}: {reason}; the run goes on without it, and metrics.jsonl has all')


def check_installed(tracker: str) -> None:
  """Raises UsageError if a tracker is not installed: before hours are spent."""
  if tracker != 'none':
    with needs_extra(f'tracker={tracker}'):
      metadata.distribution(tracker)  # no import: the tracker's folder ./wandb would be one as well


def _trackio(name: str, id: str | None, config: Mapping[str, Any]) -> Tracked:
  import trackio

  id = id or f'{name}-{secrets.token_hex(4)}'  # trackio goes on with a run by its name
  options = {'project': PROJECT, 'name': id, 'config': dict(config), 'resume': 'allow', 'embed': False}
  run = contextvars.Context().run(trackio.init, **options)  # in the current one it would end another seed's
  return Tracked(id, lambda step, values: run.log(dict(values), step), lambda _: run.finish())


def _wandb(name: str, id: str | None, config: Mapping[str, Any]) -> Tracked:
  import wandb

  options = {'resume': 'allow', 'reinit': 'create_new'}  # the latter beside another seed's
  settings = wandb.Settings(console='off', init_timeout=30)
  project = os.environ.get('WANDB_PROJECT', PROJECT)
  run = wandb.init(id=id, name=name, project=project, config=dict(config), settings=settings, **options)
  close = lambda complete: run.finish(exit_code=0 if complete else 1)  # noqa: E731
  return Tracked(run.id, lambda step, values: run.log(dict(values), step), close)


def _mlflow(name: str, id: str | None, config: Mapping[str, Any]) -> Tracked:
  # MLflow asks a server that is gone seven times, in some four minutes, while the run waits.
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', '20')
  logging.getLogger('urllib3.connectionpool').setLevel(logging.ERROR)  # or each attempt would be a warning
  import mlflow
  from mlflow.entities import Metric, Param

  client = mlflow.MlflowClient()
  if id is None:
    project = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
    found = client.get_experiment_by_name(project)
    experiment = found.experiment_id if found else client.create_experiment(project)
    id = client.create_run(experiment, run_name=name).info.run_id
    params = [Param(key, str(value)) for key, value in config.items()]
    for start in range(0, len(params), 100):  # as many as MLflow takes at once
      client.log_batch(id, params=params[start : start + 100])
  else:
    client.update_run(id, 'RUNNING')

  def log(step: int, values: Values) -> None:
    allowed = {re.sub(r'[^\w\-./ ]', '_', key): value for key, value in values.items()}
    now = round(time.time() * 1000)
    client.log_batch(id, [Metric(key, value, now, step) for key, value in allowed.items()])

  return Tracked(id, log, lambda complete: client.set_terminated(id, 'FINISHED' if complete else 'KILLED'))


def _aim(name: str, id: str | None, config: Mapping[str, Any]) -> Tracked:
  import aim

  run = aim.Run(id, experiment=PROJECT, system_tracking_interval=None, capture_terminal_logs=False)
  run.name, run['config'] = name, dict(config)
  return Tracked(run.hash, lambda step, values: run.track(dict(values), step=step), lambda _: run.close())


# Takes the run's name, its id if it goes on, and the configuration by dotted keys; opens the run.
TRACKERS: dict[str, Callable[[str, str | None, Mapping[str, Any]], Tracked]] = {
  'trackio': _trackio,
  'wandb': _wandb,
  'mlflow': _mlflow,
  'aim': _aim,
}
