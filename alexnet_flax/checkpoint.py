"""Saves and restores training states with Orbax, and digests of every file: Orbax restores a flipped byte.

Of several processes the first saves alone, and each restores for itself: none waits for another's files.
"""

import atexit
import contextlib
import dataclasses
import errno
import fnmatch
import functools
import hashlib
import logging
import operator
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.files import read_json, set_aside, write_json
from alexnet_flax.files.buckets import fetched
from alexnet_flax.steps import TrainState

PARTIAL = '.orbax-checkpoint-tmp'
MANIFEST = 'manifest.json'
_ITEM = 'default'  # Orbax's name for a checkpoint's only item
_NEEDED = (f'{_ITEM}/_METADATA', f'{_ITEM}/manifest.ocdbt')  # without them nothing can be restored
_ORBAX_METADATA = '_CHECKPOINT_METADATA'
_UNLISTED = (MANIFEST, _ORBAX_METADATA, 'commit_success.txt')  # Orbax writes these last
# Orbax takes *, ? and [ in a folder's path for patterns and /gs/... for a bucket; TensorStore makes / of a
# backslash and refuses bytes that are not UTF-8.
_UNSAFE = re.compile(r'[*?\[\\\ud800-\udfff]|^/(gs|s3|az|hf)(/|$)')

# Orbax logs a traceback of all that it raises, and needless warnings.
logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)


class SaveError(Exception):
  """A checkpoint could not be written; those before it are whole."""


def checkpoint_manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  """Returns a manager that saves asynchronously to `folder`/STEP and keeps the last `keep` and the best.

  The best has the greatest 'top1' among those saved with scores. A checkpoint appears at its place when it is
  whole, with a manifest of its files' digests inside. In other processes than the first it only restores.
  """
  _mute_echoes()
  folder.mkdir(parents=True, exist_ok=True)
  folder, score = _safe(folder), operator.itemgetter('top1')
  # `max_to_keep` with `best_fn` would drop the latest, from which a run resumes.
  best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
    best_fn=score,  # without it Orbax forgets the scores of before a restart
    create=False,  # Orbax cannot, for one of several processes
    read_only=jax.process_index() > 0,
    multiprocessing_options=_alone(),
    cleanup_tmp_directories=True,  # of saves that a kill interrupted
    async_options=ocp.options.AsyncOptions(
      # Called when all files are written, just before the checkpoint is moved to its place.
      post_finalization_callback=lambda: _write_manifests(folder),
      # If a folder cannot be created, threads that wait for it would keep the process for five minutes.
      create_directories_asynchronously=False,
    ),
  )
  # The handler is named, or a new process could not read the metadata before it restores.
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
  return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def _alone() -> ocp.options.MultiprocessingOptions:
  """Makes Orbax work in this process without the others."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(index, {index}, barrier_sync_key_prefix=f'process-{index}')


@functools.cache
def _safe(folder: pathlib.Path) -> pathlib.Path:
  """Returns a path of the folder that Orbax and TensorStore take literally: a link, where its own is not."""
  folder = folder.resolve()
  if not _UNSAFE.search(str(folder)):
    return folder
  temporary = pathlib.Path(tempfile.mkdtemp(prefix='alexnet-flax-')).resolve()
  atexit.register(shutil.rmtree, temporary, ignore_errors=True)
  if _UNSAFE.search(str(temporary)):
    raise UsageError(f'Orbax cannot write to {folder}, nor to {temporary}; use another --workdir or TMPDIR')
  (temporary / 'folder').symlink_to(folder)
  return temporary / 'folder'


def save(manager: ocp.CheckpointManager, state: TrainState, metrics: dict[str, float] | None = None) -> None:
  """Begins to save the state as the checkpoint of its step, with its scores if they are known.

  All processes call it, and the first saves. The save before must be finished. Raises SaveError if the save
  cannot begin.
  """
  step, tree = int(state.step), _whole(_saved_tree(state))
  if jax.process_index() == 0:
    with _failures(manager, step):
      manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics)


def _whole(tree: dict[str, Any]) -> dict[str, Any]:
  """Returns arrays that the first process can save alone; of several processes all must call it."""
  if jax.process_count() == 1:
    return tree
  whole = jax.device_put(tree, jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, PartitionSpec()), tree))
  # Orbax would wait for the other processes to save arrays that are on their devices too.
  return whole if jax.process_index() else jax.device_get(whole)


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until the save that has begun is complete; raises SaveError if it failed."""
  with _failures(manager, manager.latest_step()):
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
  """Restores the checkpoint of one of the manager's steps.

  `like` has the shapes, types and shardings; its static fields are taken over. Raises UsageError if the
  checkpoint is of another network or optimizer; the message names what differs.
  """
  target = _saved_tree(like)
  theirs, ours = _shapes(manager.item_metadata(step)), _shapes(target)
  for name in sorted({*ours, *theirs}, key=lambda name: (not name.startswith('params'), name)):
    if ours.get(name) != theirs.get(name):
      place = pathlib.Path(manager.directory / str(step)).resolve()
      both = f'{theirs.get(name, "absent")} there and {ours.get(name, "absent")} in this configuration'
      advice = 'use another --workdir, or the configuration that wrote it'
      raise UsageError(f'the checkpoint {place} is of another run: {name} is {both}; {advice}')
  return dataclasses.replace(like, **manager.restore(step, args=ocp.args.StandardRestore(target)))


def restore_variables(folder: pathlib.Path, which: str | None = None) -> tuple[int, dict[str, Any]]:
  """Returns the step of a checkpoint in a folder, and its {'params', 'batch_stats'} for evaluation.

  `which` is a step; or 'best', the greatest top-1 among those saved with scores, the earliest of equals; or
  None, the last whole one. Raises UsageError if there is no such checkpoint, or it is damaged.
  """
  while True:
    steps = steps_in(folder)
    try:
      step = _choose(folder, steps, which)
      saved = _restore_on_one_device(folder, step)
      return step, saved.get('ema') or {'params': saved['params'], 'batch_stats': saved['batch_stats']}
    except Exception:
      if steps_in(folder) == steps:  # else a run has removed a checkpoint in the meantime
        raise


def _choose(folder: pathlib.Path, steps: list[int], which: str | None) -> int:
  places = {step: folder / str(step) for step in steps}
  if which == 'best':
    scores = {step: (read_json(places[step] / 'metrics/metrics') or {}).get('top1') for step in steps}
    scores = {step: top1 for step, top1 in scores.items() if isinstance(top1, float)}
    step = max(scores, key=lambda step: (scores[step], -step), default=None)
  elif which is not None:
    step = int(which) if int(which) in steps else None
  else:
    step = next((step for step, place in places.items() if damage(place) is None), None)
  if step is None:
    there = f': it has those of steps {", ".join(map(str, reversed(steps)))}' if which and steps else ''
    raise UsageError(f'no checkpoint{f" {which}" if which else ""} in {folder}{there}')
  if which and (wrong := damage(places[step])):
    raise UsageError(f'the checkpoint {places[step]} is damaged: {wrong}')
  return step


def load_arrays(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Returns all arrays in the checkpoint of a step by name: 'params/conv1/kernel', ..."""
  leaves = jax.tree_util.tree_leaves_with_path(_restore_on_one_device(folder, step))
  return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _restore_on_one_device(folder: pathlib.Path, step: int) -> dict[str, Any]:
  place = _safe(folder) / str(step) / _ITEM
  on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.StandardCheckpointer() as checkpointer:
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one),
      dict(checkpointer.metadata(place).item_metadata),
      is_leaf=lambda leaf: hasattr(leaf, 'shape'),
    )
    return checkpointer.restore(place, target)


def steps_in(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints in a folder, latest first."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted((int(name) for name in names if re.fullmatch('0|[1-9][0-9]*', name)), reverse=True)


def latest_whole(folder: pathlib.Path, damaged: pathlib.Path, say: Callable[[str], None]) -> int | None:
  """Returns the step of the last undamaged checkpoint in a folder, None if there is none.

  Damaged ones after it are moved to the folder `damaged`; `say` is called with a line for each.
  """
  latest = None
  for step in steps_in(folder):
    # Of those before the last whole one, Orbax reads the scores alone.
    wrong = damage(folder / str(step), 'metrics/*' if latest else '*')
    if wrong is None:
      latest = latest or step
      continue
    aside = set_aside(folder / str(step), damaged)
    say(one_line(f'warning: the checkpoint of step {step} is damaged ({wrong}); it is set aside as {aside}'))
  return latest


# Names a leaf 'params/conv1/kernel', in a named tuple as in Orbax's dictionaries.
_name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')


@functools.cache
def _mute_echoes() -> None:
  """Silences what Orbax, asyncio and TensorStore print of a failed save, besides the error that we raise."""
  logging.getLogger('asyncio').addFilter(lambda record: 'orbax' not in record.getMessage())
  warnings.filterwarnings('ignore', message='coroutine .*async_serialize', category=RuntimeWarning)
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  sys.unraisablehook = hook


@contextlib.contextmanager
def _failures(manager: ocp.CheckpointManager, step: int | None) -> Iterator[None]:
  """Turns what Orbax and TensorStore raise for a full or broken disk into a `SaveError`."""
  try:
    yield
  except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
    for path in pathlib.Path(manager.directory).resolve().glob(f'*{PARTIAL}'):
      shutil.rmtree(path, ignore_errors=True)
    manager.reload()
    text = ' '.join(str(error).split())
    reason = 'the disk is full' if os.strerror(errno.ENOSPC) in text else text[:300]
    raise SaveError(f'the checkpoint of step {step} cannot be written: {reason}') from None


def save_alone(place: pathlib.Path, state: TrainState) -> None:
  """Saves a state, as `save` does, to a folder; raises OSError or ValueError if it cannot be written."""
  tree = _whole(_saved_tree(state))
  if jax.process_index():
    return
  place.parent.mkdir(parents=True, exist_ok=True)
  # Not the asynchronous StandardCheckpointer: it leaves threads behind where it fails.
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
  with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
    checkpointer.save(_safe(place.parent) / place.name, args=ocp.args.StandardSave(tree), force=True)
  ocp.StandardCheckpointHandler().metadata(_safe(place.parent) / place.name)  # ValueError if one is not there


def _saved_tree(state: TrainState) -> dict[str, Any]:
  """Returns what is saved of a state: all but its static fields."""
  names = ('step', 'params', 'batch_stats', 'opt_state', *(() if state.ema is None else ('ema',)))
  return {name: getattr(state, name) for name in names}


def _shapes(tree: Any) -> dict[str, str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return {_name(path): f'{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}' for path, leaf in leaves}


def damage(checkpoint: pathlib.Path, which: str = '*') -> str | None:
  """Returns what is wrong with a checkpoint's files, or None if they are as they were written.

  `which` is a pattern, to check some of its files alone.
  """
  found: dict[str, Any] | None = None
  if which == '*':
    fetched(checkpoint)
  for name in (_ORBAX_METADATA, MANIFEST):
    try:
      found = read_json(checkpoint / name)
    except UsageError:
      return f'no readable {name}'
  listed = (found or {}).get('files')
  if not isinstance(listed, dict):
    return f'no readable {MANIFEST}'
  for name in fnmatch.filter({*_NEEDED, *listed}, which):
    try:
      if _digest(checkpoint / name) != listed.get(name):
        return f'{name} has changed'
    except FileNotFoundError:
      return f'{name} is missing'
    except (OSError, ValueError) as error:  # ValueError: no name of a file
      return f'{name} cannot be read: {error}'
  return None


def _write_manifests(folder: pathlib.Path) -> None:
  """Writes the digests of all files of the checkpoint that is being written beside them.

  Raises ValueError if not all arrays are there.
  """
  for checkpoint in folder.glob(f'*{PARTIAL}'):
    ocp.StandardCheckpointHandler().metadata(checkpoint / _ITEM)  # opens each array
    paths = [path for path in sorted(checkpoint.rglob('*')) if path.is_file() and path.name not in _UNLISTED]
    files = {path.relative_to(checkpoint).as_posix(): _digest(path) for path in paths}
    write_json(checkpoint / MANIFEST, {'files': files})


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
