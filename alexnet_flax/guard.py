"""Keeps an update that is not finite out of the state, on the device, without a word to the host."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from alexnet_flax.metrics import Metrics
from alexnet_flax.steps import Batch, TrainState

Policy = Literal['stop', 'skip']
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
GuardedStep = Callable[..., tuple[TrainState, Metrics, jax.Array, jax.Array]]


def guarded(step: Step, policy: Policy) -> GuardedStep:
  """A training step that leaves the state as it was where the loss or the update is not finite.

  An update is not finite when the norm of the new parameters and statistics is not: in float32 its squares
  overflow long before the values do, when all is lost already.

  Args:
    step: `train_step`, with its options.
    policy: 'skip' counts the step as done, and its images as not seen. 'stop' does not count it, nor make
      any other update after it: the state stays what it was before that step, to be looked into.

  Returns:
    state, batch, key, going, stops -> state, metrics, going, stop. `going`, bool [], is handed on from step
    to step: whether the state was updated, and with 'stop' whether all have been so far. `stops`, bool
    [devices], says where someone asked for the end; `stop`, bool [], whether anyone did, the same for all
    processes.
  """

  def guarded_step(
    state: TrainState, batch: Batch, key: jax.Array, going: jax.Array, stops: jax.Array
  ) -> tuple[TrainState, Metrics, jax.Array, jax.Array]:
    new, metrics = step(state, batch, key)
    norm = optax.tree.norm((new.params, new.batch_stats))
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
    if policy == 'stop':
      finite &= going
    kept: Any = jax.tree.map(lambda updated, old: jnp.where(finite, updated, old), new, state)
    if policy == 'skip':
      # The schedule and the dropout go on: all that counts steps counts this one too.
      counted = jax.tree.map(
        lambda updated, old: updated if jnp.issubdtype(updated.dtype, jnp.integer) else old,
        new.opt_state,
        kept.opt_state,
      )
      kept = kept.replace(step=new.step, opt_state=counted)
      metrics = jax.tree.map(lambda value: jnp.where(finite, value, 0.0), metrics)
    return kept, metrics, finite, jnp.any(stops)

  return guarded_step
