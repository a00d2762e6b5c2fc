"""Runs a claim from nothing to its verdict: its arms, its seeds, what is left of them."""

import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

import filelock
from flax.traverse_util import flatten_dict
from scipy import stats

from alexnet_flax.config import Config, with_values
from alexnet_flax.errors import BusyError, DivergedError, UsageError
from alexnet_flax.files import read_json, write_json
from alexnet_flax.reproduction.claims import Claim, Curve, Point, epochs_until
from alexnet_flax.training.callbacks import Callback, Progress
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.train import LOCAL_KEYS, train
from alexnet_flax.training.workdir import CONFIG, environment, read_environment

# The embedded digits in a few steps: whether the machinery works, and never a verdict.
QUICK = {'data.dataset': 'digits', 'total_epochs': 6.0, 'data.eval_batch_size': 128}

_WAIT = 10.0  # seconds, for other processes
_PATIENCE = 5  # epochs without a lower training error, after which a rate is given up
_RATE = 'optimizer.learning_rate'
_ADVICE = 'remove it to begin anew, or name another place'

Outcome = Literal['reproduced', 'missed', 'undecided']


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The mean score of so many seeds, its standard error, and what follows."""

  mean: float
  standard_error: float
  seeds: int
  outcome: Outcome

  def __str__(self) -> str:
    seeds = f'{self.seeds} seed{"s" if self.seeds > 1 else ""}'
    return f'{self.outcome}: {self.mean:.4g} ± {self.standard_error:.2g} ({seeds})'


def reproduce(
  claim: Claim, folder: pathlib.Path, results: pathlib.Path | None, *, seeds: int, others: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Trains every arm and seed of a claim, goes on where it was cut off, and returns the records of the runs.

  What is recorded is not trained anew, and it is said by which commit it was. Several processes may do so at
  the same time: each takes the runs that no other is at.

  Args:
    claim: The claim.
    folder: Where the runs are; each in a folder of its own.
    results: The file of the records that this adds to, as `record` describes them; None for none.
    seeds: The number of seeds, from 0.
    others: Keys of the configuration that differ from the recipe, such as the folder of the data.

  Raises:
    UsageError: A run in the folder is of another commit or configuration, or a record of another
      configuration; or the data are not prepared.
    DivergedError: A run diverged; all others are finished.
  """
  runs: dict[tuple[str, int], dict[str, Any]] = {}
  waiting, told = [(arm, seed) for seed in range(seeds) for arm in claim.arms], False
  diverged: list[DivergedError] = []
  if results:
    runs |= _recorded(claim, results, others)
    if known := [runs[one] for one in waiting if one in runs]:
      commits = ', '.join(sorted({str(one.get('commit')) for one in known}))
      print(f'{len(known)} of {len(waiting)} runs are in {results}, by commit {commits}: not trained anew')
  while waiting:
    busy = []
    for arm, seed in waiting:
      if results:
        runs |= _recorded(claim, results, others)
      if (arm, seed) in runs:
        continue
      try:
        runs[arm, seed] = _one_run(claim, arm, seed, folder, others, runs)
      except BusyError:
        busy.append((arm, seed))
        continue
      except DivergedError as error:  # the others are still worth their time
        print(f'{arm}, seed {seed}: {error}', flush=True)
        diverged.append(error)
        continue
      if results:
        add_records(results, claim.name, [runs[arm, seed]])
    if busy and len(busy) == len(waiting):
      if not told:
        print(f'waiting for {len(busy)} runs that another process trains', flush=True)
      told = True
      time.sleep(_WAIT)
    waiting = busy
  if diverged:
    raise diverged[0]
  return [runs[key] for key in sorted(runs) if key[1] < seeds]


def _recorded(
  claim: Claim, results: pathlib.Path, others: Mapping[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
  """Returns the records of a claim's runs by arm and seed; UsageError if they are of another recipe."""
  found = {(one['arm'], one['seed']): one for one in read_records(results)}
  for (arm, seed), one in found.items():
    if arm in claim.arms:
      _require_same(claim, str(results), one['config'], claim.values(arm, seed, others))
  return found


def _one_run(
  claim: Claim,
  arm: str,
  seed: int,
  folder: pathlib.Path,
  others: Mapping[str, Any],
  runs: Mapping[tuple[str, int], dict[str, Any]],
) -> dict[str, Any]:
  """Trains one run of a claim, at the rate of the arm's other `runs` or the best one; returns its record."""
  keys = dict(others)
  if claim.rates:
    known = (one['config'].get(_RATE) for (of, _), one in runs.items() if of == arm)
    rate = next(known, None)
    keys[_RATE] = _search(claim, arm, folder, others) if rate is None else rate
  values = claim.values(arm, seed, keys)
  place = _place(folder, arm, values)
  return record(arm, values, place, _run(claim, values, place))


def _place(folder: pathlib.Path, arm: str, values: Mapping[str, Any]) -> pathlib.Path:
  return folder / f'{arm}-rate{values[_RATE]:g}-seed{values["seed"]}'


def record(arm: str, values: Mapping[str, Any], place: pathlib.Path, curve: Curve) -> dict[str, Any]:
  """Returns what is kept of a run: the keys that were stated, commit, machine, time and curve."""
  about = read_environment(place)
  return {
    'arm': arm,
    'seed': values['seed'],
    'config': json.loads(json.dumps({key: values[key] for key in sorted(values) if key != 'data.data_dir'})),
    **{key: about.get(key) for key in ('commit', 'devices', 'versions')},
    'hours': round(max((line['seconds'] for line in read_metrics(place)), default=0.0) / 3600, 3),
    'curve': [[round(value, 6) for value in point] for point in curve],
  }


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of runs in a file of results; none if there is no such file.

  Raises:
    UsageError: It holds something else.
  """
  runs = (read_json(path) or {}).get('runs', [])
  fields = {'arm': str, 'seed': int, 'config': dict, 'versions': dict, 'hours': int | float, 'curve': list}
  whole = isinstance(runs, list) and all(
    isinstance(one, dict)
    and all(isinstance(one.get(key), kind) for key, kind in fields.items())
    and all(_is_point(point) for point in one['curve'])
    and one['curve']
    for one in runs
  )
  if not whole:
    raise UsageError(f'{path} holds no records of runs; remove it, or put it back from a copy')
  return runs


def _is_point(point: Any) -> bool:
  return (
    isinstance(point, list)
    and len(point) == len(Point._fields)
    and all(isinstance(value, int | float) for value in point)
  )


def add_records(path: pathlib.Path, name: str, runs: list[dict[str, Any]]) -> None:
  """Adds runs to a file of results, in the place of those of the same arm and seed.

  Several processes may add to one file.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  lock = filelock.FileLock(path.with_name(f'.{path.name}.lock'))
  with lock:
    kept = {(one['arm'], one['seed']): one for one in [*read_records(path), *runs]}
    before = read_json(path) or {}  # with a remark, perhaps
    write_json(path, before | {'claim': name, 'runs': [kept[key] for key in sorted(kept)]})


def curves_by_seed(claim: Claim, runs: list[dict[str, Any]]) -> dict[int, dict[str, Curve]]:
  """Returns the curves of those seeds for which all arms were run, in the claim's order."""
  found: dict[int, dict[str, Curve]] = {}
  for one in runs:
    found.setdefault(one['seed'], {})[one['arm']] = [Point(*point) for point in one['curve']]
  return {
    seed: {arm: arms[arm] for arm in claim.arms}
    for seed, arms in sorted(found.items())
    if arms.keys() >= claim.arms.keys()
  }


def verdict(claim: Claim, runs: list[dict[str, Any]]) -> Verdict | None:
  """Judges a claim: reproduced within two standard errors, or better. None if no seed is complete.

  Two orders agree if their rank correlation is two standard errors or more above what one of twenty random
  orders reaches, 0.52 for eleven changes (Student's t with n - 2 degrees of freedom). With one seed, an
  error's standard error is that of a share of CIFAR-10's images, and nothing else is judged; nor is a ratio
  of runs that did not reach what they had to.
  """
  scores = [claim.score(curves) for curves in curves_by_seed(claim, runs).values()]
  if not scores:
    return None
  mean, error = statistics.fmean(scores), math.nan
  if not math.isfinite(mean):
    return Verdict(mean, error, len(scores), 'undecided')
  if len(scores) > 1:
    error = statistics.stdev(scores) / math.sqrt(len(scores))
  elif claim.unit in ('test error', 'training error'):
    error = math.sqrt(mean * (1 - mean) / (10_000 if claim.unit == 'test error' else 50_000))
  else:
    return Verdict(mean, error, len(scores), 'undecided')
  if claim.unit == 'rank correlation':
    degrees = len(claim.published_changes) - 2
    t = float(stats.t.ppf(0.95, degrees))
    chance = t / math.sqrt(degrees + t**2)
    return Verdict(mean, error, len(scores), 'reproduced' if mean - 2 * error >= chance else 'missed')
  short = mean - claim.published if claim.lower_is_better else claim.published - mean
  return Verdict(mean, error, len(scores), 'reproduced' if short <= 2 * error else 'missed')


class _ReachedError(Exception):
  """The training error has fallen to where a run may stop, or no longer falls."""


def _run(claim: Claim, values: Mapping[str, Any], place: pathlib.Path, give_up: bool = False) -> Curve:
  """Trains to the recipe's end, or until the training error has fallen far enough; returns the curve.

  With `give_up`, also until the error has not fallen for some epochs.
  """
  config = with_values(Config(), values)
  if stored := read_json(place / CONFIG):
    _require_same(claim, str(place), flatten_dict(stored, sep='.'), values)
  was, now = read_environment(place).get('commit'), environment()['commit']
  if was and was != now:
    raise UsageError(f'the run in {place} was begun by commit {was}, and this is {now}; {_ADVICE}')

  def is_enough() -> bool:
    if claim.until is None:
      return False
    curve = _curve(place)
    errors = [point.train_error for point in curve]
    stalled = len(errors) > _PATIENCE and min(errors[-_PATIENCE:]) >= min(errors[:-_PATIENCE])
    return epochs_until(curve, claim.until) < math.inf or (give_up and stalled)

  def stop(progress: Progress) -> None:
    if is_enough():
      raise _ReachedError

  if not is_enough():
    with contextlib.suppress(_ReachedError):
      train(config, place, [Callback(stop, (float(config.log_every_steps),))])
  return _curve(place)


def _require_same(claim: Claim, place: str, stored: Mapping[str, Any], values: Mapping[str, Any]) -> None:
  """Raises UsageError if what was run differs from what is asked for, in a key that both have.

  Runs that stop at a training error may be given different numbers of epochs at most.
  """
  free = LOCAL_KEYS if claim.until is None else (*LOCAL_KEYS, 'total_epochs')
  asked = json.loads(json.dumps(values))  # tuples as lists
  for key, now in asked.items():
    if key not in free and (was := stored.get(key, now)) != now:
      raise UsageError(f'{place} was made with {key} (={was!r}), and this is {now!r}; {_ADVICE}')


def _curve(place: pathlib.Path) -> Curve:
  """Reads the errors at each evaluation: of the test set, and the mean over the training steps before it."""
  points: list[Point] = []
  wrong = images = 0.0
  for line in read_metrics(place):
    if line['name'] != 'top1':
      continue
    if line['split'] == 'train':
      wrong, images = wrong + (1 - line['value']) * line['images'], images + line['images']
    elif images:
      points.append(Point(line['epoch'], wrong / images, 1 - line['value']))
      wrong = images = 0.0
  return points


def _search(claim: Claim, arm: str, folder: pathlib.Path, others: Mapping[str, Any]) -> float:
  """Returns the rate with which an arm reaches the training error in the fewest epochs, by the first seed.

  A rate is given up after as many epochs as the best before it needed, or when the error no longer falls. Of
  several that never reach it, this returns the one with the least error.
  """
  assert claim.until is not None
  needed: dict[float, tuple[float, float]] = {}
  for rate in claim.rates:
    values = claim.values(arm, 0, {**others, _RATE: rate})
    longest = min([values['total_epochs'], *(epochs for epochs, _ in needed.values())])
    values['total_epochs'] = float(math.ceil(longest))
    try:
      curve = _run(claim, values, _place(folder, arm, values), give_up=True)
      needed[rate] = epochs_until(curve, claim.until), min(point.train_error for point in curve)
    except DivergedError as error:
      print(f'{arm} at rate {rate:g}: {error}', flush=True)
      needed[rate] = math.inf, math.inf
  best = min(needed, key=lambda rate: needed[rate])
  found = ', '.join(f'{epochs:.1f} at {rate:g}' for rate, (epochs, _) in sorted(needed.items()))
  print(f'{arm}: epochs to {claim.until:.0%} training error: {found}', flush=True)
  if best in (min(needed), max(needed)):
    print(f'note: {arm}: the best rate, {best:g}, is at the edge of those tried', flush=True)
  return best
