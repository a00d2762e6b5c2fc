"""Initialises a run's state: random parameters, or those of a trained network."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alexnet_flax.config import base_spec
from alexnet_flax.errors import UsageError
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.pretrained import find_run, load_pretrained, run_config
from alexnet_flax.steps import TrainState
from alexnet_flax.training.experiment import Experiment
from alexnet_flax.training.transfer import graft
from alexnet_flax.weights import open_weights

RANDOM = 'random'  # a source that loads nothing, to compare with


def initial_state(experiment: Experiment) -> tuple[TrainState, list[str]]:
  """Returns the state before the first step, and lines that say what was loaded and what was not used.

  Raises UsageError if the source of a transfer cannot be read, or does not fit.
  """
  state, transfer = experiment.steps.init(), experiment.config.transfer
  if transfer.source in (None, RANDOM):
    return state, [] if transfer.source is None else ['loaded nothing: the parameters are random']
  whole = base_spec(experiment.config)
  # Files of other programs are mostly for the variant's own image size, whatever that of this run.
  published = dataclasses.replace(whole, image_size=VARIANTS[whole.name].image_size)
  fresh = {'params': state.params, 'batch_stats': state.batch_stats}
  try:
    source = transfer.source if find_run(transfer.source) else open_weights(transfer.source)
    try:
      loaded = load_pretrained(source, published)
    except UsageError:
      if whole == published:
        raise
      loaded = load_pretrained(source, whole)
    grafted = graft(fresh, experiment.spec, loaded.variables, loaded.spec, new_head=transfer.new_head)
  except UsageError as error:
    raise UsageError(f'transfer.source={transfer.source}: {error}') from None
  variables = jax.device_put(grafted.variables, jax.tree.map(lambda leaf: leaf.sharding, fresh))
  ema = None if state.ema is None else jax.tree.map(jnp.copy, variables)
  return dataclasses.replace(state, **variables, ema=ema), [
    f'loaded from {transfer.source}: {_named(grafted.loaded, variables)}',
    f'left out of it: {_named(grafted.left_out, loaded.variables)}',
    f'new: {_named(grafted.new, variables)}',
  ]


def model_keys(source: str) -> dict[str, Any]:
  """Returns the configuration keys that give a run the network of a transfer's source.

  Of a source that cannot be read there are none: the run that starts from it will say so.
  """
  try:
    if find_run(source):
      config = run_config(source)
      names = ('variant', 'width', 'image_size', 'activation', 'pooling', 'pool_size', 'pool_padding')
      keys = {f'model.{name}': getattr(config.model, name) for name in (*names, 'lrn', 'batch_norm')}
      return keys | {'transfer.layer': config.transfer.layer}
    spec = None if source == RANDOM else open_weights(source).find_spec()
  except UsageError:
    spec = None
  if spec is None or spec.name not in VARIANTS:
    return {}
  both = (spec, VARIANTS[spec.name])
  widest, whole = (max(getattr(layer, 'features', None) or 0 for layer in one.layers) for one in both)
  return {'model.variant': spec.name, 'model.width': widest / whole, 'model.image_size': spec.image_size}


def training_lines(experiment: Experiment, state: TrainState) -> list[str]:
  """Returns lines that say what is trained and what is frozen."""
  learner, variables = experiment.learner, {'params': state.params}
  if not learner.frozen and experiment.config.transfer.source is None:
    return []
  names = [name for name, _ in experiment.spec.named_layers()]
  trained = [name for name in names if name in state.params and name not in learner.frozen]
  frozen = _named(learner.frozen, variables) + (', their statistics too' if learner.model.fixed_norms else '')
  return [f'trained: {_named(trained, variables)}', f'frozen: {frozen}']


def _named(layers: Sequence[str], variables: Mapping[str, Any]) -> str:
  if not layers:
    return 'nothing'
  leaves = jax.tree.leaves([variables['params'].get(name, {}) for name in layers])
  return f'{", ".join(layers)} ({sum(leaf.size for leaf in leaves):,} parameters)'
