"""Training states to Orbax and back."""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from alexnet_flax.errors import UsageError
from alexnet_flax.steps import TrainState


def checkpoint_manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  """Saves asynchronously to `folder`/STEP; keeps the last `keep`, and the best besides.

  The best is that of the greatest 'top1' among those that were saved with what they scored.
  """
  # `max_to_keep` with `best_fn` would drop the latest, from which a run resumes.
  best = policies.BestN(
    get_metric_fn=lambda metrics: metrics['top1'], n=1, keep_checkpoints_without_metrics=False
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
    create=True,
  )
  # Named, or a new process could not read the metadata before it restores.
  handler = ocp.StandardCheckpointHandler()
  return ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handler)


def save(manager: ocp.CheckpointManager, state: TrainState, metrics: dict[str, float] | None = None) -> None:
  """Begins to save the state as the checkpoint of its step, with what it scored if that is known."""
  manager.save(int(state.step), args=ocp.args.StandardSave(_saved(state)), metrics=metrics)


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
  """The checkpoint of a step.

  Args:
    manager: of the run's folder.
    step: one of its steps.
    like: shapes, types and shardings; its static fields are taken over.

  Raises:
    UsageError: the checkpoint is of another network or optimiser; the message names what differs.
  """
  target = _saved(like)
  _check_same_arrays(manager.item_metadata(step), target, manager.directory / str(step))
  return dataclasses.replace(like, **manager.restore(step, args=ocp.args.StandardRestore(target)))


def restore_variables(folder: pathlib.Path) -> tuple[int, dict[str, Any]]:
  """What evaluation uses of the last checkpoint in a folder: its step, and {'params', 'batch_stats'}.

  Raises:
    UsageError: the folder has no checkpoint.
  """
  if not folder.is_dir():
    raise UsageError(f'no checkpoint in {folder}')
  with checkpoint_manager(folder, keep=1) as manager:
    step = manager.latest_step()
    if step is None:
      raise UsageError(f'no checkpoint in {folder}')
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one),
      dict(manager.item_metadata(step)),
      is_leaf=lambda leaf: hasattr(leaf, 'shape'),
    )
    saved = manager.restore(step, args=ocp.args.StandardRestore(target))
  return step, saved.get('ema') or {'params': saved['params'], 'batch_stats': saved['batch_stats']}


def _saved(state: TrainState) -> dict[str, Any]:
  saved = {
    'step': state.step,
    'params': state.params,
    'batch_stats': state.batch_stats,
    'opt_state': state.opt_state,
  }
  return saved if state.ema is None else saved | {'ema': state.ema}


def _check_same_arrays(saved: Any, target: Any, where: Any) -> None:
  theirs, ours = _shapes(saved), _shapes(target)
  for name in sorted({*ours, *theirs}, key=lambda name: (not name.startswith('params'), name)):
    if ours.get(name) != theirs.get(name):
      raise UsageError(
        f'the checkpoint {where} is of another run: {name} is {theirs.get(name, "absent")} there and'
        f' {ours.get(name, "absent")} in this configuration; use another --workdir, or the configuration'
        ' that wrote it'
      )


def _shapes(tree: Any) -> dict[str, str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return {_name(path): f'{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}' for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
  """A leaf's path, 'params/conv1/kernel', the same for named tuples and the dictionaries Orbax returns."""
  return '/'.join(str(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', p)))) for p in path)
