"""Runs a claim from nothing to its verdict: its arms, its seeds, what is left of them."""

import contextlib
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any, Literal

from alexnet_flax.config import Config, all_keys, value_of, with_values
from alexnet_flax.errors import DivergedError, UsageError
from alexnet_flax.files import read_json, write_json
from alexnet_flax.reproduction.claims import Claim, Curve, Point, epochs_until
from alexnet_flax.training.callbacks import Callback, Progress
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.train import train
from alexnet_flax.training.workdir import environment, read_environment

# The embedded digits in a few steps: whether the machinery works, and never a verdict.
QUICK = {'data.dataset': 'digits', 'total_epochs': 6.0, 'log_every_steps': 11, 'data.eval_batch_size': 128}

Outcome = Literal['reproduced', 'missed']


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The mean score of the seeds, its standard error, and what follows."""

  mean: float
  standard_error: float
  outcome: Outcome

  def __str__(self) -> str:
    return f'{self.outcome}: {self.mean:.4g} ± {self.standard_error:.2g}'


def reproduce(
  claim: Claim, folder: pathlib.Path, results: pathlib.Path | None, *, seeds: int, others: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Trains every arm and seed of a claim, goes on where it was cut off, and returns the records of the runs.

  Args:
    claim: The claim.
    folder: Where the runs are; each in a folder of its own.
    results: The file of the records that this adds to, as `record` describes them; None for none.
    seeds: The number of seeds, from 0.
    others: Keys of the configuration that differ from the recipe, such as the folder of the data.

  Raises:
    UsageError: A run in the folder is of another commit or configuration, or the data are not prepared.
  """
  runs = {(one['arm'], one['seed']): one for one in read_records(results)} if results else {}
  for arm in claim.arms:
    missing = [seed for seed in range(seeds) if (arm, seed) not in runs]
    keys = dict(others)
    if claim.search and missing:
      known = (one['config']['optimizer.learning_rate'] for (of, _), one in runs.items() if of == arm)
      rate = next(known, None)
      keys['optimizer.learning_rate'] = _search(claim, arm, folder, others) if rate is None else rate
    for seed in missing:
      config = claim.config(arm, seed, **keys)
      place = _place(folder, arm, config)
      runs[arm, seed] = record(arm, seed, config, place, _run(claim, config, place))
      if results:
        write_json(results, {'claim': claim.name, 'runs': [runs[key] for key in sorted(runs)]})
  return [runs[key] for key in sorted(runs)]


def _place(folder: pathlib.Path, arm: str, config: Config) -> pathlib.Path:
  return folder / f'{arm}-rate{config.optimizer.learning_rate:g}-seed{config.seed}'


def record(arm: str, seed: int, config: Config, place: pathlib.Path, curve: Curve) -> dict[str, Any]:
  """Returns what is kept of a run: its configuration where it is not the default, commit, time and curve."""
  about, lines = environment(), read_metrics(place)
  keys = all_keys().keys() - {'data.data_dir', 'data.num_threads', 'seed'}
  values = {
    key: value_of(config, key) for key in sorted(keys) if value_of(config, key) != value_of(Config(), key)
  }
  return {
    'arm': arm,
    'seed': seed,
    'config': values,
    'commit': about['commit'],
    'devices': about['devices'],
    'versions': about['versions'],
    'hours': round(max((line['seconds'] for line in lines), default=0.0) / 3600, 3),
    'curve': [[round(value, 6) for value in point] for point in curve],
  }


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of runs in a file of results; none if there is no such file."""
  found = read_json(path) or {'runs': []}
  return list(found['runs'])


def curves_by_seed(claim: Claim, runs: list[dict[str, Any]]) -> dict[int, dict[str, Curve]]:
  """Returns the curves of those seeds for which all arms were run."""
  found: dict[int, dict[str, Curve]] = {}
  for one in runs:
    found.setdefault(one['seed'], {})[one['arm']] = [Point(*point) for point in one['curve']]
  return {seed: arms for seed, arms in sorted(found.items()) if arms.keys() >= claim.arms.keys()}


def verdict(claim: Claim, runs: list[dict[str, Any]]) -> Verdict | None:
  """Judges a claim: reproduced within two standard errors, or better. None if no seed is complete.

  With one seed, an error's standard error is that of the share over 10,000 test images.
  """
  scores = [claim.score(curves) for curves in curves_by_seed(claim, runs).values()]
  if not scores:
    return None
  mean = statistics.fmean(scores)
  if len(scores) > 1:
    error = statistics.stdev(scores) / math.sqrt(len(scores))
  else:
    error = math.sqrt(mean * (1 - mean) / 10_000) if claim.unit == 'test error' else 0.0
  short = mean - claim.published if claim.lower_is_better else claim.published - mean
  return Verdict(mean, error, 'reproduced' if short <= 2 * error else 'missed')


class _ReachedError(Exception):
  """The training error has fallen to where a run may stop."""


def _run(claim: Claim, config: Config, place: pathlib.Path) -> Curve:
  """Trains to the recipe's end, or until the training error has fallen far enough; returns the curve."""
  _require_same_commit(place)

  def is_enough() -> bool:
    return claim.until is not None and epochs_until(_curve(place), claim.until) < math.inf

  def stop(progress: Progress) -> None:
    if is_enough():
      raise _ReachedError

  if not is_enough():
    with contextlib.suppress(_ReachedError):
      train(config, place, [Callback(stop, (float(config.log_every_steps),))])
  return _curve(place)


def _require_same_commit(place: pathlib.Path) -> None:
  was, now = read_environment(place).get('commit'), environment()['commit']
  if place.exists() and was != now:
    advice = 'remove that folder to begin anew, or give another --workdir'
    raise UsageError(f'the run in {place} was begun by commit {was}, and this is {now}; {advice}')


def _curve(place: pathlib.Path) -> Curve:
  """Reads the errors at each line of training; the test set is measured right after, if at all."""
  points: list[Point] = []
  for line in read_metrics(place):
    if line['name'] != 'top1':
      continue
    if line['split'] == 'train':
      points.append(Point(line['epoch'], 1 - line['value'], points[-1].test_error if points else 1.0))
    elif points:
      points[-1] = points[-1]._replace(test_error=1 - line['value'])
  return points


def _search(claim: Claim, arm: str, folder: pathlib.Path, others: Mapping[str, Any]) -> float:
  """Returns the rate with which an arm reaches the training error in the fewest epochs, by the first seed."""
  assert claim.search is not None
  needed: dict[float, float] = {}
  for rate in claim.search.rates:
    config = claim.config(arm, 0, **others, **{'optimizer.learning_rate': rate})
    longest = min([config.total_epochs, *needed.values()])  # no run need be longer than the best before it
    config = with_values(config, {'total_epochs': float(math.ceil(longest))})
    try:
      needed[rate] = epochs_until(_run(claim, config, _place(folder, arm, config)), claim.search.train_error)
    except DivergedError as error:
      print(f'{arm} at rate {rate:g}: {error}', flush=True)
      needed[rate] = math.inf
  best = min(needed, key=lambda rate: needed[rate])
  print(f'{arm}: of the rates {", ".join(map(str, needed))} {best:g} needs the fewest epochs', flush=True)
  return best
