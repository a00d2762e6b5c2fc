"""The state before a run's first step, with what it takes over from a trained network."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from alexnet_flax import config as configuration
from alexnet_flax.errors import UsageError
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.steps import TrainState
from alexnet_flax.training.experiment import Run
from alexnet_flax.training.transfer import count, graft

RANDOM = 'random'  # the source of nothing, to compare with


def start(run: Run) -> tuple[TrainState, list[str]]:
  """The state, and lines that say what was loaded and what was left out.

  Raises:
    UsageError: the source cannot be read, or does not fit.
  """
  state, transfer = run.make_state(), run.config.transfer
  if transfer.source in (None, RANDOM):
    return state, [] if transfer.source is None else ['loaded nothing: the parameters are random']
  spec = run.model.spec
  try:
    whole = configuration.whole_network(run.config)
    # Files of other programs are for the variant's own images most often, whatever the size of this run's.
    published = dataclasses.replace(whole, image_size=VARIANTS[whole.name].image_size)
    try:
      theirs, pretrained = load_pretrained(transfer.source, published)
    except UsageError:
      if whole == published:
        raise
      theirs, pretrained = load_pretrained(transfer.source, whole)
    fresh = {'params': state.params, 'batch_stats': state.batch_stats}
    grafted = graft(fresh, spec, pretrained, theirs, new_head=transfer.new_head)
  except UsageError as error:
    raise UsageError(f'transfer.source={transfer.source}: {error}') from None
  variables = jax.device_put(grafted.variables, jax.tree.map(lambda leaf: leaf.sharding, fresh))
  ema = None if state.ema is None else jax.tree.map(jnp.copy, variables)
  state = dataclasses.replace(
    state, params=variables['params'], batch_stats=variables.get('batch_stats', {}), ema=ema
  )
  lines = [
    f'loaded from {transfer.source}: {_named(grafted.loaded, count(variables, grafted.loaded))}',
    f'left out of it: {_named(grafted.left_out, count(pretrained, grafted.left_out))}',
    f'new: {_named(grafted.new, count(variables, grafted.new))}',
  ]
  return state, lines


def training_lines(run: Run, state: TrainState) -> list[str]:
  """Lines that say what is trained and what is frozen."""
  if not run.frozen and run.config.transfer.source is None:
    return []
  names = [name for name, _ in run.model.spec.named_layers()]
  trained = [name for name in names if name in state.params and name not in run.frozen]
  variables = {'params': state.params}
  statistics = ', their statistics too' if run.model.fixed_norms else ''
  return [
    f'trained: {_named(trained, count(variables, trained))}',
    f'frozen: {_named(run.frozen, count(variables, run.frozen))}{statistics}',
  ]


def _named(layers: Sequence[str], parameters: int) -> str:
  return f'{", ".join(layers)} ({parameters:,} parameters)' if layers else 'nothing'
