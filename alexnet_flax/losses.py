"""Losses: functions of logits and labels that return one number per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
  """Returns -log softmax(logits) of the labels, in nats.

  Args:
    logits: float [B, C].
    labels: int [B], or float [B, C] whose rows are distributions.
    label_smoothing: The share of each label that is spread evenly over all classes
      (Szegedy et al. 2015, section 7).

  Returns:
    float [B].

  Raises:
    ValueError: The labels' shape fits neither form.

  >>> round(float(cross_entropy(jnp.zeros([1, 1000]), jnp.array([3]))[0]), 3)
  6.908
  """
  targets = optax.smooth_labels(target_distribution(logits, labels), label_smoothing)
  return optax.softmax_cross_entropy(logits, targets)


def mean_squared_error(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
  """Returns the squared distance of softmax(logits) to the (smoothed) labels, averaged over the classes.

  Arguments, result and errors as for `cross_entropy`. The mean over classes is Keras's definition.
  """
  targets = optax.smooth_labels(target_distribution(logits, labels), label_smoothing)
  return jnp.mean(jnp.square(jax.nn.softmax(logits) - targets), axis=-1)


def target_distribution(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns labels as float [B, C]: one-hot rows of int [B], or the distributions themselves."""
  if labels.shape == logits.shape:
    return labels.astype(logits.dtype)
  if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    expected = f'integers of shape {logits.shape[:-1]} or distributions of shape {logits.shape}'
    raise ValueError(f'labels (of shape {labels.shape}, {labels.dtype}) must be {expected}')
  return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


LOSSES: dict[str, Callable[..., jax.Array]] = {
  'cross_entropy': cross_entropy,
  'mean_squared_error': mean_squared_error,
}
