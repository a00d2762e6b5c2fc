"""Adversarial images: the fast gradient sign method, and projected gradient descent."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from alexnet_flax.data.augment import standardize
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.losses import cross_entropy
from alexnet_flax.models.alexnet import AlexNet

Method = Literal['fgsm', 'pgd']
Norm = Literal['linf', 'l2']
Predict = Callable[[jax.Array], jax.Array]  # images -> logits
_TINY = 1e-10  # added to norms that are divided by, which may be 0


@dataclasses.dataclass(frozen=True)
class Attack:
  """A method with its settings; raises UsageError for those that cannot be.

  Attributes:
    method: 'fgsm' or 'pgd'.
    norm: In which the change of an image is bounded: 'linf', of each value, or 'l2', of all together.
    epsilon: The bound, for values in 0 ... 1.
    steps: Of pgd, which starts at random.
  """

  method: Method
  norm: Norm
  epsilon: float
  steps: int = 20

  def __post_init__(self) -> None:
    for what, value, kind in (('attack', self.method, Method), ('norm', self.norm, Norm)):
      if value not in get_args(kind):
        raise unknown_name(what, value, get_args(kind))
    if not 0 <= self.epsilon < math.inf or (self.norm == 'linf' and self.epsilon > 1):
      scale = 'the values of pixels are in 0 ... 1 here: 8/255 is 8 of 255 levels'
      raise UsageError(f'epsilon (={self.epsilon:g}) is no bound for {self.norm}; {scale}')
    if self.steps < 1:
      raise UsageError(f'steps (={self.steps}) must be at least 1')

  def __str__(self) -> str:
    method = 'FGSM' if self.method == 'fgsm' else f'PGD of {self.steps} steps from a random start'
    return f'{method}, epsilon in {self.norm} of values in 0 ... 1'

  def __call__(
    self, predict: Predict, images: jax.Array, labels: jax.Array, epsilon: Any, key: jax.Array
  ) -> jax.Array:
    """Returns adversarial images, for `epsilon` in the place of its own; see `fgsm` and `pgd`."""
    if self.method == 'fgsm':
      return fgsm(predict, images, labels, epsilon, norm=self.norm)
    return pgd(predict, images, labels, epsilon, norm=self.norm, steps=self.steps, key=key)


def logits_of(model: AlexNet, variables: Any) -> Predict:
  """Returns a network as a function from RGB in 0 ... 1, [B, H, W, 3], to logits [B, C]: what is attacked."""

  def predict(images: jax.Array) -> jax.Array:
    inputs = standardize(images * 255.0, model.spec.preprocessing)
    logits: Any = model.apply(variables, inputs, train=False)
    return logits

  return predict


def fgsm(
  predict: Predict,
  images: jax.Array,
  labels: jax.Array,
  epsilon: Any,
  *,
  norm: Norm = 'linf',
) -> jax.Array:
  """Fast gradient sign method: one step of length epsilon up the loss (Goodfellow et al. 2015, section 4).

  Args:
    predict: From images to logits [B, C], such as `logits_of(model, variables)`.
    images: float RGB in 0 ... 1, [B, H, W, 3].
    labels: int [B], the classes whose cross-entropy is to grow.
    epsilon: The greatest change, in the units of the images.
    norm: 'linf': each value changes by epsilon, in the direction of its gradient's sign; 'l2': the image
      moves by epsilon along its gradient.

  Returns:
    Images of the same shape, in 0 ... 1.
  """
  return jnp.clip(images + epsilon * _direction(predict, images, labels, norm), 0.0, 1.0)


def pgd(
  predict: Predict,
  images: jax.Array,
  labels: jax.Array,
  epsilon: Any,
  *,
  norm: Norm = 'linf',
  steps: int = 20,
  step_size: Any = None,
  key: jax.Array | None = None,
) -> jax.Array:
  """Projected gradient descent: steps up the loss, each projected onto the ball (Madry et al. 2018).

  Args:
    predict, images, labels, norm: See `fgsm`.
    epsilon: The radius of the ball, in the units of the images.
    steps: Their number.
    step_size: The length of one; 2.5 * epsilon / steps if None, which leads from any point of the ball to any
      other (Madry et al. 2018 take it for 100 steps).
    key: For a start drawn uniformly from the ball; from the images themselves if None.

  Returns:
    Images of the same shape, in 0 ... 1.
  """
  size = 2.5 * epsilon / steps if step_size is None else step_size

  def project(moved: jax.Array) -> jax.Array:
    change = moved - images
    if norm == 'linf':
      change = jnp.clip(change, -epsilon, epsilon)
    else:
      change = change * jnp.minimum(1.0, epsilon / jnp.maximum(_length(change), _TINY))
    return jnp.clip(images + change, 0.0, 1.0)

  start = images
  if key is not None:
    noise_key, radius_key = jax.random.split(key)
    if norm == 'linf':
      noise = jax.random.uniform(noise_key, images.shape, images.dtype, -1.0, 1.0)
    else:
      noise = jax.random.normal(noise_key, images.shape, images.dtype)
      share = jax.random.uniform(radius_key, (len(images), 1, 1, 1), images.dtype)
      noise *= share ** (1 / math.prod(images.shape[1:])) / _length(noise)
    start = project(images + epsilon * noise)
  return jax.lax.fori_loop(
    0, steps, lambda _, x: project(x + size * _direction(predict, x, labels, norm)), start
  )


def _direction(predict: Predict, images: jax.Array, labels: jax.Array, norm: Norm) -> jax.Array:
  """The direction of length 1 in which the loss of each image grows most."""
  gradient = jax.grad(lambda x: cross_entropy(predict(x), labels).sum())(images)
  return jnp.sign(gradient) if norm == 'linf' else gradient / (_length(gradient) + _TINY)


def _length(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x), (1, 2, 3), keepdims=True))
