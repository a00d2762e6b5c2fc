"""Metrics as weighted sums, which add up exactly over batches, devices and processes."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import struct

from alexnet_flax.losses import target_distribution


@struct.dataclass
class Metrics:
  """Sums over images; `metrics['loss']` is the mean, and `+` merges.

  Attributes:
    sums: Weighted sums by name: 'loss' in the loss's units, 'top1' in images, and 'top5', of six classes or
      more.
    images: The summed weight: the number of images counted, where all weights are 0 or 1.

  >>> a = Metrics({'top1': jnp.array(3.0)}, jnp.array(4.0))
  >>> b = Metrics({'top1': jnp.array(0.0)}, jnp.array(2.0))
  >>> float((a + b)['top1'])
  0.5
  """

  sums: dict[str, jax.Array]
  images: jax.Array

  def __getitem__(self, name: str) -> jax.Array:
    return self.sums[name] / self.images

  def __add__(self, other: 'Metrics') -> 'Metrics':
    return jax.tree.map(jnp.add, self, other)

  def keys(self) -> Iterable[str]:
    """The names of the metrics, so that `dict(metrics)` has all means."""
    return self.sums.keys()

  def means(self) -> dict[str, float]:
    """Returns the means on the host; NaN where no image was counted."""
    host = jax.tree.map(float, jax.device_get(self))
    return {name: total / host.images if host.images else math.nan for name, total in host.sums.items()}


def measure(logits: jax.Array, labels: jax.Array, losses: jax.Array, weight: jax.Array) -> Metrics:
  """Returns the sums of loss, top-1 and top-5 hits of one batch.

  Args:
    logits: float [B, C].
    labels: int [B], or distributions [B, C], whose greatest entry counts as the label.
    losses: float [B].
    weight: float [B]; 0 for padding.

  Raises:
    ValueError: The losses do not have one value per example.
  """
  if losses.shape != weight.shape:
    raise ValueError(f'the losses (of shape {losses.shape}) must have one value per example: {weight.shape}')
  label = jnp.argmax(target_distribution(logits, labels), axis=-1)
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  hits = best == label[:, None]
  values = {'loss': losses, 'top1': hits[:, 0]}
  if logits.shape[-1] > 5:  # of fewer classes all are among five
    values['top5'] = jnp.any(hits, axis=-1)

  def total(value: jax.Array) -> jax.Array:
    # A weight of 0 silences its example even where the value is not finite.
    return jnp.sum(jnp.where(weight > 0, value.astype(weight.dtype) * weight, 0.0))

  return Metrics(jax.tree.map(total, values), jnp.sum(weight))
