"""Attributions: which pixels speak for a class, by derivatives or by covering parts of the image.

A derivative is that of the class's logit by the network's input, [N, H, W, 3], whose channels have the
network's order (Caffe's have BGR). BatchNorm uses its running statistics.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.features import Images, inputs_of
from alexnet_flax.inference.grad_cam import grad_cam
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.layers import relu
from alexnet_flax.models.spec import Activation, Spec

Classes = Sequence[int] | np.ndarray | None
Color = int | tuple[int, int, int]

_BATCH = 16  # inputs of every call of a program, so that it is compiled once


def gradient(
  model: AlexNet, variables: Any, images: Images, classes: Classes = None, *, preprocessed: bool = False
) -> np.ndarray:
  """Computes the gradient of a class's logit by the input (Simonyan et al. 2014, arXiv:1312.6034).

  Args:
    model: The network.
    variables: Its variables.
    images: As for `features`: uint8 RGB of any sizes, or floats with `preprocessed`. An attribution is of
      what the network sees: the crop of an image.
    classes: int [N]; the top-1 prediction of each image if None.
    preprocessed: Whether the images are what the network receives.

  Returns:
    float32 [N, H, W, 3].

  Raises:
    ValueError: Images or classes have another shape, or the network has no such class.
  """
  inputs, labels = _inputs(model, variables, images, classes, preprocessed)
  return np.stack([*_evaluate(model, variables, inputs, labels)])


def smoothgrad(
  model: AlexNet,
  variables: Any,
  images: Images,
  classes: Classes = None,
  *,
  samples: int = 16,
  noise: float = 0.15,
  seed: int = 0,
  preprocessed: bool = False,
) -> np.ndarray:
  """Computes the mean gradient of `samples` copies with noise (Smilkov et al. 2017, arXiv:1706.03825).

  The noise's standard deviation is `noise` times the range of the image's values; it is the same for each
  image, drawn by `seed`. For all else see `gradient`; ValueError also if there are no samples.
  """
  if samples < 1:
    raise ValueError(f'samples (={samples}) must be at least 1')

  def mean(x: np.ndarray, label: int) -> np.ndarray:
    rng, deviation = np.random.default_rng(seed), noise * np.ptp(x)
    noisy = (x + deviation * rng.standard_normal(x.shape, x.dtype.type) for _ in range(samples))
    return sum(_evaluate(model, variables, noisy, itertools.repeat(label))) / np.asarray(samples, x.dtype)

  inputs, labels = _inputs(model, variables, images, classes, preprocessed)
  return np.stack([*map(mean, inputs, labels)])


def integrated_gradients(
  model: AlexNet,
  variables: Any,
  images: Images,
  classes: Classes = None,
  *,
  baseline: Color = 0,
  steps: int = 32,
  preprocessed: bool = False,
) -> np.ndarray:
  """Computes integrated gradients from a baseline to the image (Sundararajan et al. 2017, arXiv:1703.01365).

  An image's attributions sum to the difference of its logit and the baseline's, but for the error of the
  integral, which falls with the number of `steps`, of Gauss's and Legendre's rule. The baseline is a colour
  in 0 ... 255; black, as in the paper. For all else see `gradient`; ValueError also if there are no steps.
  """
  nodes, weights = np.polynomial.legendre.leggauss(steps)

  def integral(x: np.ndarray, label: int) -> np.ndarray:
    start = _received(baseline, model.spec).astype(x.dtype)
    path = (start + ((1 + node) / 2).astype(x.dtype) * (x - start) for node in nodes)
    gradients = _evaluate(model, variables, path, itertools.repeat(label))
    return (x - start) * sum(map(np.multiply, (weights / 2).astype(x.dtype), gradients))

  inputs, labels = _inputs(model, variables, images, classes, preprocessed)
  return np.stack([*map(integral, inputs, labels)])


def guided_backprop(
  model: AlexNet, variables: Any, images: Images, classes: Classes = None, *, preprocessed: bool = False
) -> np.ndarray:
  """Computes guided backpropagation (Springenberg et al. 2015, arXiv:1412.6806); see `gradient`.

  Backwards, a ReLU passes what is positive where its input was: what both the gradient and `deconvnet` pass.
  Raises UsageError for a network without ReLU.
  """
  guided = _with_relu(model, _guided_relu)
  return gradient(guided, variables, images, classes, preprocessed=preprocessed)


def deconvnet(
  model: AlexNet, variables: Any, images: Images, classes: Classes = None, *, preprocessed: bool = False
) -> np.ndarray:
  """Computes what a deconvolutional network shows (Zeiler and Fergus 2014, arXiv:1311.2901); see `gradient`.

  Backwards, a ReLU passes what is positive, whatever its input was; the switches of a max pool are the places
  of its maxima. We start from the class's logit, not from a feature, and norms have their derivatives. Raises
  UsageError for a network without ReLU.
  """
  deconvolving = _with_relu(model, _deconvnet_relu)
  return gradient(deconvolving, variables, images, classes, preprocessed=preprocessed)


def occlusion(
  model: AlexNet,
  variables: Any,
  images: Images,
  classes: Classes = None,
  *,
  window: int | None = None,
  stride: int | None = None,
  color: Color = 127,
  preprocessed: bool = False,
) -> np.ndarray:
  """Computes how far a class's logit falls where a square covers the image (Zeiler and Fergus 2014, 4.2).

  The square has a side of `window` pixels, two ninths of the image's if None, and a colour in 0 ... 255;
  grey, as in the paper. It moves by `stride`, half of the window if None, the last time over the border. A
  map is the mean fall over the squares that cover a pixel, float32 [N, H, W]; negative is against the
  class. For all else see `gradient`; ValueError also if the stride is not in 1 ... `window`.
  """
  inputs, labels = _inputs(model, variables, images, classes, preprocessed)
  window = 2 * -(-min(inputs.shape[1:3]) // 9) if window is None else window
  stride = max(window // 2, 1) if stride is None else stride
  if not 1 <= stride <= window:
    raise ValueError(f'stride (={stride}) must be in 1 ... window (={window})')
  starts = [range(0, max(side - window, 0) + stride, stride) for side in inputs.shape[1:3]]
  squares = [np.s_[top : top + window, left : left + window] for top, left in itertools.product(*starts)]
  cover = _received(color, model.spec)

  def covered(x: np.ndarray, square: Any) -> np.ndarray:
    changed = x.copy()
    changed[square] = cover
    return changed

  def falls(x: np.ndarray, label: int) -> np.ndarray:
    images = itertools.chain([x], (covered(x, square) for square in squares))
    whole, *others = (logits[label] for logits in _evaluate(model, variables, images))
    total, count = np.zeros((2, *x.shape[:2]), x.dtype)
    for square, logit in zip(squares, others, strict=True):
      total[square] += whole - logit
      count[square] += 1
    return total / count

  return np.stack([*map(falls, inputs, labels)])


_FUNCTIONS = (gradient, smoothgrad, integrated_gradients, guided_backprop, deconvnet, grad_cam, occlusion)
METHODS: dict[str, Callable[[AlexNet, Any, Images, np.ndarray], np.ndarray]] = {
  function.__name__: function for function in _FUNCTIONS
}
OF_RELU = ('guided_backprop', 'deconvnet')  # that change ReLU's derivative, and nothing else


def has_relu(spec: Spec) -> bool:
  """Returns whether any layer is a ReLU."""
  return Activation('relu') in spec.layers


def _with_relu(model: AlexNet, function: Callable[[jax.Array], jax.Array]) -> AlexNet:
  if not has_relu(model.spec):
    raise UsageError(
      f"{' and '.join(OF_RELU)} can only change ReLU's derivative, and this network has no ReLU"
    )
  return model.clone(relu=function)


def _relu_with(backward: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
  """Returns ReLU with another derivative, a function of its result and of what comes back."""
  function = jax.custom_vjp(lambda x: relu(x))
  function.defvjp(lambda x: (relu(x), relu(x)), lambda result, cotangent: (backward(result, cotangent),))
  return function


_guided_relu = _relu_with(lambda result, cotangent: jnp.where(result > 0, relu(cotangent), 0 * cotangent))
_deconvnet_relu = _relu_with(lambda _, cotangent: relu(cotangent))


def _inputs(
  model: AlexNet, variables: Any, images: Images, classes: Classes, preprocessed: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what the network receives, float [N, H, W, 3], and the class of each, int32 [N]."""
  views = np.stack([*inputs_of(images, model.spec, preprocessed=preprocessed)])
  inputs = views if preprocessed else _normalized(views, model.spec)
  if classes is None:
    return inputs, np.array([logits.argmax() for logits in _evaluate(model, variables, inputs)], np.int32)
  labels, number = np.asarray(classes, np.int32), model.num_classes or model.spec.num_classes
  if labels.shape != (len(inputs),) or not ((labels >= 0) & (labels < number)).all():
    raise ValueError(f'classes (={labels}) must be {len(inputs)} in 0 ... {number - 1}, one for each image')
  return inputs, labels


def _normalized(images: np.ndarray, spec: Spec) -> np.ndarray:
  return np.asarray(normalize({'image': jnp.asarray(images)}, preprocessing=spec.preprocessing)['image'])


def _received(color: Color, spec: Spec) -> np.ndarray:
  """Returns a colour as the network receives it, float32 [3]."""
  return _normalized(np.full((1, 1, 1, 3), color, np.uint8), spec)[0, 0, 0]


def _evaluate(
  model: AlexNet, variables: Any, inputs: Iterable[np.ndarray], labels: Iterable[int] | None = None
) -> Iterator[np.ndarray]:
  """Yields the logits [C] of each input; with labels, the gradients [H, W, 3] of theirs."""
  stream = zip(inputs, itertools.repeat(0) if labels is None else labels, strict=False)
  program, variables = _compiled(model, labels is not None), jax.device_put(variables)
  while rows := list(itertools.islice(stream, _BATCH)):
    batch = zip(*rows, *rows[:1] * (_BATCH - len(rows)), strict=True)
    yield from np.asarray(program(variables, *map(np.stack, batch)))[: len(rows)]


@functools.lru_cache(maxsize=16)
def _compiled(model: AlexNet, differentiated: bool) -> Any:
  def logits(variables: Any, inputs: jax.Array, labels: jax.Array) -> Any:
    del labels
    return model.apply(variables, inputs, train=False)

  def total(inputs: jax.Array, variables: Any, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits(variables, inputs, labels), labels[:, None], axis=1).sum()

  def gradients(variables: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.grad(total)(inputs, variables, labels)

  return jax.jit(gradients if differentiated else logits)
